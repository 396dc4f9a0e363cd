"""Drive DeepSpeed: process groups, the training module, optimizer state by parameter name."""
