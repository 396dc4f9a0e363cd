"""Formats of export, one file per format: what the rest of the program asks of each.

How they are written: ``writers/``.
"""
