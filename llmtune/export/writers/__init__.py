"""Write the weights of a model: one writer per kind of file."""
