"""Verify that the files of an export are the model that was trained."""
