"""Trackers that take too much of Python's time for the process that trains."""
