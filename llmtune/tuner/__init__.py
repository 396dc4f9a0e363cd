"""Tuners, one file per tuner, and the adapters that some of them attach."""
