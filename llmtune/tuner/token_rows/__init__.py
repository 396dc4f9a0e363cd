"""Single rows of embeddings that are trained beside adapters."""
