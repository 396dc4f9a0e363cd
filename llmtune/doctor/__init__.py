"""Find what on this machine would stop a run."""
