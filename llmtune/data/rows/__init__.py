"""A row of a file becomes a conversation, whatever its format."""
