"""What a model is trained to do: its head, the targets of its rows, its loss and its metrics."""
