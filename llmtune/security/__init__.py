"""Whose files are trusted, what a terminal may be told, and what is taken out of every text."""
