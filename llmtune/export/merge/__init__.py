"""Merge an adapter into its base as one stream of tensors."""
