"""From YAML files and overrides to one typed, checked :class:`~llmtune.config.schema.Config`."""
