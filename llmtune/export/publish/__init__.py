"""Publish an export: written aside, renamed in one step, and uploaded."""
