"""Training: construction in ``build.py``, the loop in ``loop.py``, side concerns as hooks."""
