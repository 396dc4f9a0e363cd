"""Whether what was written is what was trained."""
