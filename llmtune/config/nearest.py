"""Suggest the known name that a wrong one was probably meant to be."""

from __future__ import annotations

import difflib


def nearest(word: str, known: set[str]) -> str:
    """Return ``": did you mean ...?"``, or an empty text.

    A key is also compared without its group.
    """
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    if not close:
        tails: dict[str, str] = {key.rsplit(".", 1)[-1]: key for key in sorted(known)}
        tail = difflib.get_close_matches(word.rsplit(".", 1)[-1], list(tails), n=1, cutoff=0.75)
        close = [tails[tail[0]]] if tail else []
    return f": did you mean {close[0]!r}?" if close else ""
