"""Activations of a micro-batch, traced on fake tensors, and the bytes of its loss."""
