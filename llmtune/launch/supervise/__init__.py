"""Supervise the ranks of this machine: watch, signal, restart and explain their failures."""
