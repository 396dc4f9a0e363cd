"""Spell out control characters in texts of others before they are written to a terminal.

A terminal executes C0 and C1 controls (ECMA-48): they overwrite what it showed, change its title,
or send text back to the prompt as if the user had typed it.
"""

import json
import re
from typing import Any

from llmtune.security.redaction import redact

#: C0 but for tab and newline, DEL, and C1. Letters that run from right to left and joiners of emoji
#: are none of them.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
#: The colors that llmtune itself writes.
GREEN, GRAY, PLAIN = "\x1b[32m", "\x1b[90m", "\x1b[0m"


def show_controls(text: str) -> str:
    r"""Spell out control characters: ``\x1b`` for an escape, and so on."""
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def color(text: str, code: str) -> str:
    """Wrap a text in one of our colors, with its own control characters spelled out."""
    return f"{code}{show_controls(text)}{PLAIN}"


def to_terminal(text: str) -> str:
    """Make a text safe for standard output and error: without secrets and control characters."""
    return show_controls(redact(text))


def to_json_line(value: Any, indent: int | None = None, letters: bool = False) -> str:
    """Write JSON without control characters.

    JSON itself leaves DEL as it is, and C1 where other letters beyond ASCII are kept.

    Args:
        letters: Leave those beyond ASCII as they are.
    """
    text = json.dumps(value, ensure_ascii=not letters, indent=indent)
    # All other controls are escaped; the newlines are those of the indent.
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
