"""What an optimizer does to one mode: closed forms, SGD's recurrence, stability, error bounds; no network."""
