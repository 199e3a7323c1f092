"""A data set in a fixed order: its batches, its samples by content, what its targets mean."""
