"""Model folders that are derived from a base's: other settings, other names, the same weights."""
