"""A model and what belongs to it: tokenizer, weights, loss, answers."""
