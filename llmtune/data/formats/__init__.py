"""Formats of rows, one file per format: what a row is recognised by, and how it becomes a
conversation.
"""
