"""Tuners, one file per tuner."""
