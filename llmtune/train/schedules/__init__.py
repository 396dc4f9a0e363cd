"""Shapes of the learning rate after warm-up, one file per shape."""
