"""Tell how far the writing of an export is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProgressCallbacks:
    """Functions that are told the progress of an export; by default nothing is."""

    total: Callable[[int], None] = lambda _: None
    """Bytes that will be written."""
    done: Callable[[int], None] = lambda _: None
    """Bytes that were."""
