"""Refuse a row of which the rendered text lacks something that it says.

Templates drop what they do not know: calls of tools, their results and definitions, what the model
thought. A model that is trained on the rest learns to answer without them. So after rendering, each
piece of a row is searched for in the text, as it is or escaped: the longest first, and no letter is
counted twice.

A short piece, such as ``1`` or ``ok``, may be in the template's own words by accident. For rows
of each shape the template is therefore rendered once with a made-up word in every place, which
cannot.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace

from llmtune.data.rows.conversation import Conversation
from llmtune.data.rows.problems import RowError, short
from llmtune.data.tokenize.pieces import TAG, Kind, Piece, Walk
from llmtune.template_errors import TEMPLATE_ERRORS

#: Pieces of more letters are in no template's own words by accident.
SHORT = 16

#: Shapes of rows and sets of tools that are remembered.
REMEMBERED = 4096


class Completeness:
    """Checks the texts of one template."""

    def __init__(self, render: Callable[[Conversation], str]):
        """
        Args:
            render: The template.
        """
        self._render = render
        self._dropped: dict[Hashable, frozenset[int]] = {}
        self._tools: dict[str, tuple[list[Piece], frozenset[int]]] = {}

    def check(self, conversation: Conversation, text: str) -> None:
        """Compare a row with its text.

        Raises:
            RowError: The text does not hold all of it.
        """
        walk = Walk()
        for index, message in enumerate(conversation.messages):
            walk.message(index, message)
        tools, lost_of_tools = self._read_tools(conversation)
        missing = find_missing(walk.pieces, tools, text) | {
            len(walk.pieces) + index for index in lost_of_tools
        }
        short_ones = _short(walk.pieces)
        if short_ones:
            missing |= short_ones & self._find_dropped(conversation, (len(tools), *walk.shape))
        pieces = [*walk.pieces, *tools]
        lost = [pieces[index] for index in sorted(missing)]
        # Its call has the name of a result too, and most templates write it there alone.
        lost += [piece for piece in walk.names if not _is_written(piece, text)]
        if lost:
            raise RowError(_describe(lost))

    def _find_dropped(self, conversation: Conversation, shape: Hashable) -> frozenset[int]:
        """Find pieces of messages that the template drops in rows of this shape."""
        if shape not in self._dropped:
            if len(self._dropped) >= REMEMBERED:
                self._dropped.clear()
            walk = Walk(disguise=True)
            messages = tuple(
                walk.message(index, message) for index, message in enumerate(conversation.messages)
            )
            self._dropped[shape] = self._try(replace(conversation, messages=messages), walk)
        return self._dropped[shape]

    def _read_tools(self, conversation: Conversation) -> tuple[list[Piece], frozenset[int]]:
        """Return the pieces of the definitions, and the numbers of short ones that are dropped."""
        if not conversation.tools:
            return [], frozenset()
        # Millions of rows share a few sets of tools.
        key = json.dumps(conversation.tools, default=str)
        if key not in self._tools:
            if len(self._tools) >= REMEMBERED:
                self._tools.clear()
            walk, disguised = Walk(), Walk(disguise=True)
            for tool in conversation.tools:
                walk.tool(tool)
            tools = tuple(disguised.tool(tool) for tool in conversation.tools)
            dropped = self._try(replace(conversation, tools=tools), disguised)
            self._tools[key] = walk.pieces, dropped & _short(walk.pieces)
        return self._tools[key]

    def _try(self, disguised: Conversation, walk: Walk) -> frozenset[int]:
        """Return the numbers of the made-up words that do not appear."""
        try:
            return frozenset(find_missing(walk.pieces, [], self._render(disguised)))
        except TEMPLATE_ERRORS:
            # The template looks at the words, and refuses these; so the row's own text has to do.
            return frozenset()


def _short(pieces: list[Piece]) -> set[int]:
    return {index for index, piece in enumerate(pieces) if len(str(piece.value)) <= SHORT}


def find_missing(messages: list[Piece], tools: list[Piece], text: str) -> set[int]:
    """Return the numbers of the pieces (of messages, then of tools) that are not in the text.

    Each needs its own position there.
    """
    # Nearly always, each follows the one before it.
    used = bytearray(len(text))
    if _take_in_order(tools, text, used) and _take_in_order(messages, text, used):
        return set()
    used = bytearray(len(text))
    pieces = [*messages, *tools]
    by_length = sorted(range(len(pieces)), key=lambda index: -len(str(pieces[index].value)))
    missing = set()
    for index in by_length:
        if not any(_take(form, text, used, 0) for form in _forms(pieces[index])):
            missing.add(index)
    return missing


def _is_written(piece: Piece, text: str) -> bool:
    return any(form in text for form in _forms(piece))


def _take_in_order(pieces: list[Piece], text: str, used: bytearray) -> bool:
    position = 0
    for piece in pieces:
        for form in _forms(piece):
            end = _take(form, text, used, position)
            if end:
                position = end
                break
        else:
            return False
    return True


def _take(form: str, text: str, used: bytearray, position: int) -> int:
    """Find a place where no letter is taken, and take it; its end, or 0 for none."""
    at = text.find(form, position)
    while at >= 0:
        end = at + len(form)
        clash = used.find(1, at, end)
        if clash < 0:
            used[at:end] = b"\1" * len(form)
            return end
        free = used.find(0, clash)
        at = text.find(form, free) if free >= 0 else -1
    return 0


def _forms(piece: Piece) -> Iterator[str]:
    """Return the ways to write a piece: as it is or in JSON; tools also as in Python and HTML."""
    value = piece.value
    if not isinstance(value, str):
        yield json.dumps(value)
        yield str(value)
        return
    yield value
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield json.dumps(value)[1:-1]
    if piece.kind in (Kind.call, Kind.result, Kind.tool):
        yield repr(value)[1:-1]
        yield html.escape(value)
        # As Jinja has it.
        yield html.escape(value).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")


def _describe(missing: list[Piece]) -> str:
    # A tag says less than its contents.
    first = next((piece for piece in missing if not TAG.fullmatch(str(piece.value))), missing[0])
    more = f" and {len(missing) - 1} more of what the row says" if len(missing) > 1 else ""
    return (
        f"the chat template leaves out {first.where} ({short(first.value)}{more});"
        f" {first.kind.value}"
    )
