"""Find the launcher that started this process, and read its variables."""
