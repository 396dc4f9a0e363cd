"""The span of an answer in a rendered text."""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    """The characters that an answer adds to the text, its end of turn included."""

    start: int
    """First character."""
    end: int
    """The character behind the last."""
    train: bool
    """True if the message is to be trained."""
