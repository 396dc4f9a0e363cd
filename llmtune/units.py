"""Read and write bytes, counts and times as people do."""

from __future__ import annotations

import re

from llmtune.errors import ConfigError

_FACTORS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    _FACTORS[f"{_letter}B"] = 1000**_power
    _FACTORS[f"{_letter}IB"] = 1024**_power


def parse_bytes(value: int | float | str, key: str) -> int:
    """Parse an integer, or a text such as ``80GB``, ``80GiB``, ``1.5TB``, as bytes.

    Raises:
        ConfigError: Naming ``key`` and the value.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMGTP]?I?B?)\s*", str(value).upper())
    if match and match[2] in _FACTORS:
        try:
            return int(float(match[1]) * _FACTORS[match[2]])
        except ValueError:
            pass
    raise ConfigError(f"{key}={value}: bytes as an integer, or such as 80GB, 80GiB, 2TB")


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
