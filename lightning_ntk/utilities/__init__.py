"""Python and torch only: contexts, attention, processes, progress, memory, validation, errors, warnings, imports, reprs, shapes."""
