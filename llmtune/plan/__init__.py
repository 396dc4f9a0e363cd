"""The frozen plan: hardware, model shape, batches, memory, placement, DeepSpeed's dictionary."""
