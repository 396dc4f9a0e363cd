"""One supervisor, N ranks: environment, start, watch, signals, end."""
