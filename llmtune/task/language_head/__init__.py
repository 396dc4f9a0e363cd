"""Computation of a language model's loss inside its output projection, without its logits."""
