"""What a run reports: metrics file, console, loss plot, experiment trackers."""
