"""Make a conversation from a row of a file, whatever its format."""
