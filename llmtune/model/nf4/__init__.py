"""Models whose linear layers are kept in NF4: the layer, the model, and how weights are read."""
