"""Batches of a rank, made of tokenized rows."""
