"""Read sizes of memory as people write them."""

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
