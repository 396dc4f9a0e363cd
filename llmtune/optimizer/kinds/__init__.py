"""Optimizers, one file per optimizer."""
