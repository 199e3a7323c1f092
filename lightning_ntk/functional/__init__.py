"""The distances as pure functions."""
