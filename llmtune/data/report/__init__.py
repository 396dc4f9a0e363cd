"""Report on the data before training: checks, numbers and a page."""
