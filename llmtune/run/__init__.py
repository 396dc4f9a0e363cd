"""A run from the command line to its published model: preparation, ranks, fallback, finish."""
