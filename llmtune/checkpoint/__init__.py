"""Checkpoints that do not know where they came from: names, files, manifest, save, find, load."""
