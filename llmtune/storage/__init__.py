"""Files: write, replace, lock, hash and copy them; names in a run folder; file formats."""
