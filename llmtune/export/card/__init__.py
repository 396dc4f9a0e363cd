"""The model card of an export, and the facts in it."""
