"""Compose YAML files and overrides to a typed, checked :class:`~llmtune.config.schema.Config`."""
