"""Prepare what ranks need before they start: compiled ops, a swap folder, cores."""
