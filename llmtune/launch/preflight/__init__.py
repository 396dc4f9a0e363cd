"""What must be there before ranks start: compiled ops, a swap folder, cores."""
