"""What a model and its training take: parameters, activations, and the states of ZeRO."""
