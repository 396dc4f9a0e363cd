"""Formats of rows, one file per format: how a row is recognized and becomes a conversation."""
