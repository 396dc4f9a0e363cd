"""A finding of ``doctor``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The state of one thing that a run needs."""

    what: str
    state: str
    """``ok``, ``note`` (works, but), ``bad`` (stops a run)."""
    message: str
    command: str | None = None
    """The command that fixes it."""
    fix: Callable[[], str | None] | None = None
    """The same as a function, where it is safe to do unasked; it returns why it failed, or None."""
