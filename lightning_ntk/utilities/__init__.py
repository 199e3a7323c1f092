"""Python and torch only: contexts, process groups, progress, memory, validation, errors, warnings, lazy imports."""
