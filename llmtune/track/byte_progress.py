"""Tell how far something is that writes a known number of bytes."""

from __future__ import annotations

import time

from llmtune.track.console import bar
from llmtune.units import format_bytes, format_seconds


class ByteProgress:
    """Counts bytes, and describes their number, the speed and the time left."""

    def __init__(self, with_bar: bool = False):
        """
        Args:
            with_bar: Draw a bar, for a terminal.
        """
        self._with_bar = with_bar
        self._total = self._done = 0
        self._began: float | None = None

    def expect(self, size: int) -> None:
        """Take the number of bytes that there will be in all."""
        self._total = size
        self._began = self._began or time.monotonic()

    def add(self, size: int) -> None:
        """Count bytes that are done."""
        self._done += size

    def describe(self) -> str:
        """Describe what is done; empty where the size is not known yet."""
        if not self._total or self._began is None:
            return ""
        if self._done >= self._total:
            return f"{format_bytes(self._done)} written"
        share = self._done / self._total
        seconds = time.monotonic() - self._began
        text = f"{share:.0%} of {format_bytes(self._total)}"
        if self._done and seconds > 0:
            speed = self._done / seconds
            left = format_seconds((self._total - self._done) / speed)
            text += f", {format_bytes(speed)}/s, ETA {left}"
        return f"{bar(share)} {text}" if self._with_bar else text
