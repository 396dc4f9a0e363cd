"""Read how to load an export from its card, which is Markdown of ``export/card/templates``."""

from __future__ import annotations

import html
import re

from llmtune.report.page import Block, Code, Text

_HEADING = "## Load it"
_FENCE = "```"
#: The page names the folder instead.
_HERE = "Run this in the folder that this file is in."
_ESCAPED = re.compile(r"\\([\\`*\[\]|#_])")


def find_load_section(card: str) -> str:
    """Return the section of a card that says how to load and serve; empty without one."""
    _, found, rest = card.partition(f"\n{_HEADING}\n")
    if not found:
        return ""
    end = re.search(r"^## ", _without_code(rest), re.MULTILINE)
    return rest[: end.start()].strip() if end else rest.strip()


def _without_code(text: str) -> str:
    """Blank the code out, in which ``##`` begins a comment; every other letter stays in place."""
    pieces = text.split(_FENCE)
    return _FENCE.join(
        re.sub(r"[^\n]", " ", piece) if number % 2 else piece for number, piece in enumerate(pieces)
    )


def to_blocks(section: str) -> list[Block]:
    """Turn the section into paragraphs and code."""
    blocks: list[Block] = []
    for number, piece in enumerate(section.split(_FENCE)):
        if number % 2:
            blocks.append(Code(piece.partition("\n")[2].rstrip()))
            continue
        paragraphs = (" ".join(paragraph.split()) for paragraph in piece.split("\n\n"))
        blocks += [Text(_unescape(text)) for text in paragraphs if text not in ("", _HERE)]
    return blocks


def _unescape(text: str) -> str:
    return html.unescape(_ESCAPED.sub(r"\1", text)).replace("`", "")
