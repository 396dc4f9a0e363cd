"""Training: construction on one page (``job.py``), the loop on another (``loop.py``), side concerns
as hooks.
"""
