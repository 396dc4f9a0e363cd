"""Tokenized rows on disk: mixed, packed, read back."""
