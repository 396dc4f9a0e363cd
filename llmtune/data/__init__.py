"""Sources -> conversations -> tokens with a mask -> batches, each step in a file of its own."""
