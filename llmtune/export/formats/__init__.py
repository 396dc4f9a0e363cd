"""Formats of export, one file per format, with all that the rest of the program asks of it.

The code that writes them is in ``writers/``, the text for the model card in ``card/templates/``.
"""
