"""Tokenizer, weights, adapters, loss, answers."""
