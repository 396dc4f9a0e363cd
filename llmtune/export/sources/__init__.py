"""Read the tensors of a model, a block of rows at a time."""
