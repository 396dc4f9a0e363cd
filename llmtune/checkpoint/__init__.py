"""Checkpoints: save, find, load, prune and copy them, independent of the ranks that wrote them."""
