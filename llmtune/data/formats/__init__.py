"""Formats of rows, one file per format: what a row is recognized by, and how it becomes a
conversation.
"""
