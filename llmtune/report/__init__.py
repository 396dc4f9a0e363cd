"""The page of a run, and pages that compare runs: read a run folder, draw, write one file."""
