"""Python and torch only: contexts, attention, processes, progress, memory, checks, errors, warnings, imports, reprs, shapes."""
