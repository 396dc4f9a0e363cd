"""Formats of export, one file per format: what the rest of the program asks of each.

The code that writes them is in ``writers/``, the text for the model card in ``card/templates/``.
"""
