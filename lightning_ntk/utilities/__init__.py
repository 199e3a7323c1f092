"""Python and torch only: contexts, attention, process groups, progress, memory, validation, errors, lazy imports, texts, shapes."""
