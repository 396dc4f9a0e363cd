"""Tokenizing: from conversations to token ids with a mask of what is trained."""
