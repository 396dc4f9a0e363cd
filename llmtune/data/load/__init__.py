"""Rows become the batches of a rank."""
