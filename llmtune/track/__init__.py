"""The reports of a run: metrics file, console, loss plot, experiment trackers."""
