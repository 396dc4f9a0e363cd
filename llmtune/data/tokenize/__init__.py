"""Conversations become token ids with a mask of what is trained."""
