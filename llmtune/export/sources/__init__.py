"""Where an export's tensors come from, a block of rows at a time."""
