"""Python and torch only: contexts, process groups, progress, memory, validation, errors of other code, lazy imports."""
