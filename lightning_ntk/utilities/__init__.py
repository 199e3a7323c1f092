"""Python and torch only: contexts, attention, process groups, progress, memory, validation, errors, warnings, lazy imports."""
