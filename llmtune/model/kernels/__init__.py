"""Faster functions in the place of a model's modules, and whether they compute the same."""
