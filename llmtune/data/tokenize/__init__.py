"""Make token ids, and a mask of what is trained, from conversations."""
