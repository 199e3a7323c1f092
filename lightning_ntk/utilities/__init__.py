"""Python and torch only: contexts, attention on dual numbers, process groups, progress, memory, validation, errors, warnings, lazy imports."""
