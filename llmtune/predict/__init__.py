"""Predict the rows of a file with a finished model, in pieces that outlive a killed command."""
