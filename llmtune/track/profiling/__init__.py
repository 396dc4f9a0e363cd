"""The trace of some steps: read, shared out, and told in plain words (``debug=profile``)."""
