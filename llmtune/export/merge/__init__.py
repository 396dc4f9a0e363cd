"""An adapter and its base become one stream of tensors."""
