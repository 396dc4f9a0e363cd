"""All that a row says stands in its rendered text, or the row is refused.

Templates drop what they do not know: calls of tools, their results and definitions, what the model thought. A model that is
trained on the rest learns to answer without them. So after rendering each piece of a row is looked for in the text, as it
is or escaped, with a place of its own: the longest first, and no letter is counted twice.

A short piece, such as ``1`` or ``ok``, may stand in the template's own words by accident. For rows of each shape the
template is therefore rendered once with a made-up word in every place, which cannot.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from enum import Enum
from typing import Any, NamedTuple

import jinja2

from llmtune.data.conversation import Conversation, Message, Role
from llmtune.data.problems import RowError, short


class Kind(Enum):
    """What a piece is, and what helps where it is missing."""

    content = "take a data.chat_template that writes it as it is"
    reasoning = "take a data.chat_template that writes what the model thinks, or take it out of the row"
    call = "take a data.chat_template that writes calls of tools, such as qwen, or the model's own"
    result = "take a data.chat_template that writes results of tools, such as qwen, or the model's own"
    tool = (
        "take a data.chat_template that writes tools, such as qwen, or the model's own; or take it out of the row's tools, "
        "as ignore: [tools] of the source does with all of them"
    )


class Piece(NamedTuple):
    """Something that a row says."""

    value: Any
    """Text, or a number or truth value of a call's arguments."""
    where: str
    kind: Kind


#: Between what the model thinks and what it says, where both are content.
_TAG = re.compile(r"(</?(?:think|thinking|thought|thoughts|reasoning|reason|seed:think)>|\[/?THINK\]|◁/?think▷)")

#: Pieces of more letters stand in no template's own words by accident.
SHORT = 16

#: Shapes of rows and sets of tools that are remembered.
REMEMBERED = 4096

#: Fields of a schema that hold schemas, or lists or mappings of them.
_INNER = ("items", "prefixItems", "anyOf", "oneOf", "allOf", "$defs", "definitions", "additionalProperties")


class Completeness:
    """Checks the texts of one template."""

    def __init__(self, render: Callable[[Conversation], str]):
        """
        Args:
            render: The template.
        """
        self._render = render
        self._dropped: dict[Hashable, frozenset[int]] = {}
        self._tools: dict[str, list[Piece]] = {}

    def check(self, conversation: Conversation, text: str) -> None:
        """Compare a row with its text.

        Raises:
            RowError: The text does not hold all of it.
        """
        walk = _Walk()
        for number, message in enumerate(conversation.messages):
            walk.message(number, message)
        tools = self._pieces_of_tools(conversation)
        missing = find_missing(walk.pieces, tools, text)
        short_ones = {number for number, piece in enumerate(walk.pieces) if len(str(piece.value)) <= SHORT}
        if short_ones:
            missing |= short_ones & self._find_dropped(conversation, (len(conversation.tools), *walk.shape))
        pieces = [*walk.pieces, *tools]
        lost = [pieces[number] for number in sorted(missing)]
        # Its call has the name of a result too, and most templates write it there alone.
        lost += [piece for piece in walk.names if not any(form in text for form in _forms(piece))]
        if lost:
            raise RowError(_describe(lost))

    def _find_dropped(self, conversation: Conversation, shape: Hashable) -> frozenset[int]:
        """Pieces of messages in whose place the template writes nothing, for rows of a shape."""
        if shape not in self._dropped:
            if len(self._dropped) >= REMEMBERED:
                self._dropped.clear()
            walk = _Walk(disguise=True)
            messages = tuple(walk.message(number, message) for number, message in enumerate(conversation.messages))
            try:
                text = self._render(replace(conversation, messages=messages))
                self._dropped[shape] = frozenset(find_missing(walk.pieces, [], text))
            except (jinja2.TemplateError, TypeError, ValueError, AttributeError):
                # The template looks at the words, and refuses these; so the row's own text has to do.
                self._dropped[shape] = frozenset()
        return self._dropped[shape]

    def _pieces_of_tools(self, conversation: Conversation) -> list[Piece]:
        if not conversation.tools:
            return []
        # Millions of rows share a few sets of tools.
        key = json.dumps(conversation.tools, default=str)
        if key not in self._tools:
            if len(self._tools) >= REMEMBERED:
                self._tools.clear()
            self._tools[key] = [piece for tool in conversation.tools for piece in _read_tool(tool)]
        return self._tools[key]


def find_missing(messages: list[Piece], tools: list[Piece], text: str) -> set[int]:
    """Numbers of the pieces, of messages and then of tools, that have no place of their own in the text."""
    # Nearly always, each stands behind the one before it.
    used = bytearray(len(text))
    if _take_in_order(tools, text, used) and _take_in_order(messages, text, used):
        return set()
    used = bytearray(len(text))
    pieces = [*messages, *tools]
    by_length = sorted(range(len(pieces)), key=lambda number: -len(str(pieces[number].value)))
    return {number for number in by_length if not any(_take(form, text, used, 0) for form in _forms(pieces[number]))}


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
        if used.find(1, at, end) < 0:
            used[at:end] = b"\1" * len(form)
            return end
        at = text.find(form, at + 1)
    return 0


def _forms(piece: Piece) -> Iterator[str]:
    """How something may be written: as it is or in JSON; what tools are and say, as Python and HTML have it too."""
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


class _Walk:
    """Goes through messages and notes their pieces, and what rows have in common for which a template does the same."""

    def __init__(self, disguise: bool = False) -> None:
        """
        Args:
            disguise: Put a made-up word in the place of each piece.
        """
        self._disguise = disguise
        self.pieces: list[Piece] = []
        self.names: list[Piece] = []
        self.shape: list[Hashable] = []

    def message(self, number: int, message: Message) -> Message:
        """Note a message; the message, disguised if it is to be."""
        place = f"message {number} ({message.role.value})"
        self.shape += (message.role, message.trained)
        content = self._content(message, place)
        if not message.extra:
            return replace(message, content=content) if self._disguise else message
        extra = dict(message.extra)
        self.shape += sorted(extra)
        reasoning = extra.get("reasoning_content")
        # What was thought before an earlier answer that is not trained is not there at inference either.
        if reasoning and message.trained:
            said = self._note(reasoning.strip(), f"the reasoning of {place}", Kind.reasoning)
            extra |= {key: said for key, value in extra.items() if value == reasoning}
        if "name" in extra and message.role is Role.tool:
            self.names.append(Piece(extra["name"], "the name of a tool's result", Kind.result))
        elif "name" in extra:
            extra["name"] = self._note(extra["name"], f"the name of {place}", Kind.content)
        calls = [self._call(call, place) for call in extra.get("tool_calls", ())]
        extra |= {"tool_calls": calls} if calls else {}
        return replace(message, content=content, extra=extra)

    def _content(self, message: Message, place: str) -> str:
        """What is said, and what is thought within tags."""
        parts = _TAG.split(message.content) if message.role is Role.assistant else [message.content]
        said_as = Kind.result if message.role is Role.tool else Kind.content
        # What precedes the end of thinking is thought, also where the beginning stands in the prompt.
        thinks = len(parts) > 1 and "/" in parts[1]
        for index, part in enumerate(parts):
            tag = index % 2 == 1
            thinks = "/" not in part if tag else thinks
            core = part.strip()
            self.shape.append(part if tag else bool(core))
            if not core or ((tag or thinks) and not message.trained):
                continue
            kind, what = (Kind.reasoning, "reasoning") if tag or thinks else (said_as, "content")
            said = self._note(core, f"the {what} of {place}", kind, keep=tag)
            parts[index] = part.replace(core, said) if self._disguise else part
        return "".join(parts)

    def _call(self, call: Mapping[str, Any], place: str) -> dict[str, Any]:
        function = call["function"]
        where = f"the call of {function['name']!r} in {place}"
        name = self._note(function["name"], where, Kind.call)
        arguments = self._arguments(function["arguments"], f"the arguments of {where}")
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def _arguments(self, value: Any, where: str) -> Any:
        if isinstance(value, Mapping):
            self.shape.append(f"{{{len(value)}")
            return {self._note(key, where, Kind.call): self._arguments(item, where) for key, item in value.items()}
        if isinstance(value, list | tuple):
            self.shape.append(f"[{len(value)}")
            return [self._arguments(item, where) for item in value]
        if value is None or (isinstance(value, str) and not value.strip()):
            self.shape.append(None)
            return value
        self.shape.append(str(value) if isinstance(value, bool) else type(value).__name__)
        # There are only two truth values to choose from.
        return self._note(value, where, Kind.call, keep=isinstance(value, bool))

    def _note(self, value: Any, where: str, kind: Kind, keep: bool = False) -> Any:
        """Note a piece.

        Args:
            keep: Also under a disguise.
        """
        if self._disguise and not keep:
            number = len(self.pieces)
            value = f"zq{number}qz" if isinstance(value, str) else type(value)(70_010_000 + number)
        self.pieces.append(Piece(value.strip() if isinstance(value, str) else value, where, kind))
        return value


def _read_tool(tool: Mapping[str, Any]) -> Iterator[Piece]:
    """What a definition tells the model: names, descriptions, what may be chosen. Types are written in many ways."""
    inner = tool.get("function")
    function = inner if isinstance(inner, Mapping) else tool
    where = f"the definition of the tool {short(function.get('name'))}"
    for field in ("name", "description"):
        if isinstance(function.get(field), str) and function[field].strip():
            yield Piece(function[field].strip(), where, Kind.tool)
    for field in ("parameters", "input_schema"):
        yield from _read_schema(function.get(field), where)


def _read_schema(schema: Any, where: str) -> Iterator[Piece]:
    if isinstance(schema, list):
        for item in schema:
            yield from _read_schema(item, where)
    if not isinstance(schema, Mapping):
        return
    description = schema.get("description")
    if isinstance(description, str) and description.strip():
        yield Piece(description.strip(), where, Kind.tool)
    choices = schema.get("enum")
    for choice in choices if isinstance(choices, list) else ():
        if choice is not None and choice != "":
            yield Piece(choice, where, Kind.tool)
    properties = schema.get("properties")
    for name, inner in properties.items() if isinstance(properties, Mapping) else ():
        yield Piece(name, where, Kind.tool)
        yield from _read_schema(inner, where)
    for field in _INNER:
        inner = schema.get(field)
        definitions = field in ("$defs", "definitions") and isinstance(inner, Mapping)
        yield from _read_schema(list(inner.values()) if definitions and inner else inner, where)


def _describe(missing: list[Piece]) -> str:
    # A tag says less than what stands in it.
    first = next((piece for piece in missing if not _TAG.fullmatch(str(piece.value))), missing[0])
    more = f" and {len(missing) - 1} more of what the row says" if len(missing) > 1 else ""
    return f"the chat template leaves out {first.where} ({short(first.value)}{more}); {first.kind.value}"
