"""Looking on: metrics file, console, loss plot, W&B, behind one small interface."""
