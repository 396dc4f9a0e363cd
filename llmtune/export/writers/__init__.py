"""How models are written: one writer per kind of file."""
