"""Trust in files, safe texts for a terminal, and removal of secrets from every text."""
