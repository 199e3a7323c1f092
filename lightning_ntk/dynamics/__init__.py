"""What an optimizer does to the modes of a linearized network."""
