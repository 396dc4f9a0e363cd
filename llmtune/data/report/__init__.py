"""What somebody looks at before training: checks, numbers, a page."""
