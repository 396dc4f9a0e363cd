"""A model's architecture: its settings, checked and corrected, and a model without weights."""
