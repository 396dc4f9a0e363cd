"""Tasks that a model is trained for: head, targets of the rows, loss and metrics."""
