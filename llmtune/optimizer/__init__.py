"""Optimizers: one file per optimizer, which plan, engine, checkpoints and card ask."""
