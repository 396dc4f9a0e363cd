"""What a stranger gives cannot run, read or destroy anything."""
