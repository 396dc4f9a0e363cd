"""Which launcher started this process, and what it says."""
