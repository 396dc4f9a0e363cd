"""Checks of llmtune on a GPU, each a real run as a user starts it, compared with the same run on
the CPU.
"""
