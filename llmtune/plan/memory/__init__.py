"""The memory of a model and its training: parameters, activations and ZeRO's states."""
