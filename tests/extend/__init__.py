"""Variants that are added from outside: each in a file of its own, with nothing in llmtune/
touched.
"""
