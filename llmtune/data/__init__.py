"""Sources -> conversations -> tokens with a mask -> batches, each step in its own file."""
