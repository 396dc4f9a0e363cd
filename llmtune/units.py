"""Write bytes, counts, times and lists as people do."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """Format bytes like ``141.1 GB``: decimal units, at most four digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def format_count(count: float) -> str:
    """Format a number of parameters or tokens like ``70.6 B`` or ``134.5 M``."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f}"


def counted(count: float, noun: str) -> str:
    """Format a number with its noun: ``1 rank``, ``1,000 ranks``, ``0.5 epochs``."""
    number = f"{count:g}" if isinstance(count, float) else f"{count:,}"
    return f"{number} {noun}{'' if count == 1 else 's'}"


def format_seconds(seconds: float) -> str:
    """Format seconds like ``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def some(names: list[str], shown: int = 4) -> str:
    """List the first few names, and count the rest."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
