"""Serving: what was trained, the server that answers for it, and its command line."""
