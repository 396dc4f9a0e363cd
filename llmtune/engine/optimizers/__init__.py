"""Optimizers that DeepSpeed's engine drives in the place of its own."""
