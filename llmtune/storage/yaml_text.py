"""Write values as YAML that reads back unchanged; PyYAML alone does not for every text."""

from __future__ import annotations

from typing import Any

import yaml

#: Line ends of Unicode. PyYAML does not escape them in quoted text, where it reads them as a space.
_LINE_ENDS = frozenset("\x85\u2028\u2029")


class _Dumper(yaml.SafeDumper):
    """PyYAML's dumper, with such texts in double quotes, where it escapes them."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if _LINE_ENDS.intersection(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)


def to_yaml(values: Any, width: float = 80) -> str:
    """Write dictionaries, lists and plain values as a YAML document, keys in their order.

    Args:
        width: Columns after which lines are folded.
    """
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)
    return text
