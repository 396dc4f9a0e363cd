"""List the pieces of what a row says: words, thoughts, tool calls, results and definitions."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import replace
from enum import Enum
from typing import Any, NamedTuple

from llmtune.data.rows.conversation import Message, Role
from llmtune.data.rows.problems import short


class Kind(Enum):
    """The kind of a piece; its value is the advice where it is missing."""

    content = "take a data.chat_template that writes it as it is"
    reasoning = (
        "take a data.chat_template that writes what the model thinks, or take it out of the row"
    )
    call = "take a data.chat_template that writes calls of tools, such as qwen, or the model's own"
    result = (
        "take a data.chat_template that writes results of tools, such as qwen, or the model's own"
    )
    tool = (
        "take a data.chat_template that writes tools, such as qwen, or the model's own; or take it"
        " out of the row's tools, as ignore: [tools] of the source does with all of them"
    )


class Piece(NamedTuple):
    """Something that a row says."""

    value: Any
    """Text, or a number or truth value of arguments and choices."""
    where: str
    kind: Kind


#: Between what the model thinks and what it says, where both are content.
TAG = re.compile(
    r"(</?(?:think|thinking|thought|thoughts|reasoning|reason|seed:think)>|\[/?THINK\]|◁/?think▷)"
)

#: Fields of a schema that hold schemas, or lists or mappings of them.
_INNER = (
    "items",
    "prefixItems",
    "anyOf",
    "oneOf",
    "allOf",
    "$defs",
    "definitions",
    "additionalProperties",
)

#: Those whose schemas have names, which only they themselves refer to.
_NAMED = ("$defs", "definitions")


class Walk:
    """Walks through a row and notes its pieces and its shape.

    The shape is what rows have in common for which a template does the same.
    """

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
        """Note a message, and return it, disguised if that was asked for."""
        location = f"message {number} ({message.role.value})"
        self.shape += (message.role, message.trained)
        content = self._content(message, location)
        if not message.extra:
            return replace(message, content=content) if self._disguise else message
        extra = dict(message.extra)
        self.shape += sorted(extra)
        reasoning = extra.get("reasoning_content")
        # Thoughts before an earlier answer that is not trained are not there at inference either.
        if reasoning and message.trained:
            said = self._note(reasoning.strip(), f"the reasoning of {location}", Kind.reasoning)
            extra |= {key: said for key, value in extra.items() if value == reasoning}
        if "name" in extra and message.role is Role.tool:
            self.names.append(Piece(extra["name"], "the name of a tool's result", Kind.result))
        elif "name" in extra:
            extra["name"] = self._note(extra["name"], f"the name of {location}", Kind.content)
        calls = [self._call(call, location) for call in extra.get("tool_calls", ())]
        extra |= {"tool_calls": calls} if calls else {}
        return replace(message, content=content, extra=extra)

    def _content(self, message: Message, location: str) -> str:
        """Note the words, and thoughts within tags; return the content, perhaps disguised."""
        parts = TAG.split(message.content) if message.role is Role.assistant else [message.content]
        said_as = Kind.result if message.role is Role.tool else Kind.content
        # What precedes the end of thinking is thought, also where the beginning is in the prompt.
        thinks = len(parts) > 1 and "/" in parts[1]
        for index, part in enumerate(parts):
            tag = index % 2 == 1
            thinks = "/" not in part if tag else thinks
            core = part.strip()
            self.shape.append(part if tag else bool(core))
            if not core or ((tag or thinks) and not message.trained):
                continue
            kind, what = (Kind.reasoning, "reasoning") if tag or thinks else (said_as, "content")
            said = self._note(core, f"the {what} of {location}", kind, keep=tag)
            parts[index] = part.replace(core, said) if self._disguise else part
        return "".join(parts)

    def _call(self, call: Mapping[str, Any], location: str) -> dict[str, Any]:
        function = call["function"]
        where = f"the call of {function['name']!r} in {location}"
        name = self._note(function["name"], where, Kind.call)
        arguments = self._arguments(function["arguments"], f"the arguments of {where}")
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def _arguments(self, value: Any, where: str) -> Any:
        if isinstance(value, Mapping):
            self.shape.append(f"{{{len(value)}")
            return {
                self._note(key, where, Kind.call): self._arguments(item, where)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            self.shape.append(f"[{len(value)}")
            return [self._arguments(item, where) for item in value]
        if value is None or (isinstance(value, str) and not value.strip()):
            self.shape.append(None)
            return value
        self.shape.append(str(value) if isinstance(value, bool) else type(value).__name__)
        # There are only two truth values to choose from.
        return self._note(value, where, Kind.call, keep=isinstance(value, bool))

    def tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        """Note what a definition tells the model: names, descriptions, what may be chosen.

        Types are written in many ways.
        """
        inner = tool.get("function")
        said = dict(inner if isinstance(inner, Mapping) else tool)
        where = f"the definition of the tool {short(said.get('name'))}"
        for field in ("name", "description"):
            if isinstance(said.get(field), str) and said[field].strip():
                said[field] = self._note(said[field], where, Kind.tool)
        for field in ("parameters", "input_schema"):
            if field in said:
                said[field] = self._schema(said[field], where)
        return {**tool, "function": said} if isinstance(inner, Mapping) else said

    def _schema(self, schema: Any, where: str) -> Any:
        if isinstance(schema, list):
            return [self._schema(item, where) for item in schema]
        if not isinstance(schema, Mapping):
            return schema
        said = dict(schema)
        if isinstance(said.get("description"), str) and said["description"].strip():
            said["description"] = self._note(said["description"], where, Kind.tool)
        if isinstance(said.get("enum"), list):
            said["enum"] = [self._choice(choice, where) for choice in said["enum"]]
        if isinstance(properties := said.get("properties"), Mapping):
            said["properties"] = {
                self._note(name, where, Kind.tool): self._schema(inner, where)
                for name, inner in properties.items()
            }

        # Schemas within this one. Names that only the schema refers to tell the model nothing.
        for field in _INNER:
            if field in _NAMED and isinstance(named := said.get(field), Mapping):
                said[field] = {name: self._schema(inner, where) for name, inner in named.items()}
            elif field in said:
                said[field] = self._schema(said[field], where)
        return said

    def _choice(self, value: Any, where: str) -> Any:
        if isinstance(value, str) and value.strip():
            return self._note(value, where, Kind.tool)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        return self._note(value, where, Kind.tool) if numeric else value

    def _note(self, value: Any, where: str, kind: Kind, keep: bool = False) -> Any:
        """Note a piece, if it says anything.

        Args:
            keep: Also under a disguise.
        """
        if isinstance(value, str) and not value.strip():
            return value
        if self._disguise and not keep:
            number = len(self.pieces)
            value = f"zq{number}qz" if isinstance(value, str) else type(value)(70_010_000 + number)
        self.pieces.append(Piece(value.strip() if isinstance(value, str) else value, where, kind))
        return value
