"""Checks, numbers and a page to look at before training."""
