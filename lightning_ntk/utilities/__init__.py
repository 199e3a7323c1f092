"""Python and torch only: contexts, process groups, progress, memory, validation, errors of other code, warnings at the user's line, lazy imports."""
