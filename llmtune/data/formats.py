"""Row formats: each function turns one row into a conversation. A new format is one function and one entry below."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmtune.config.schema import DataFormat
from llmtune.data.conversation import Conversation, Message, Role
from llmtune.errors import DataError

Row = Mapping[str, Any]


def from_alpaca(row: Row, where: str) -> Conversation:
    """``instruction``, optional ``input`` and ``system``, and ``output``."""
    instruction = _text(row, "instruction", where)
    extra = _text(row, "input", where, required=False)
    system = _text(row, "system", where, required=False)
    answer = Message(Role.assistant, _text(row, "output", where))
    question = Message(Role.user, f"{instruction}\n\n{extra}" if extra else instruction)
    return Conversation((Message(Role.system, system), question, answer) if system else (question, answer), where)


def from_messages(row: Row, where: str) -> Conversation:
    """``messages``: a list of ``{role, content}`` that ends with the assistant."""
    entries = row.get("messages")
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{where}: 'messages' must be a list of {{role, content}}, not {_short(entries)}")
    messages = []
    for index, entry in enumerate(entries):
        place = f"{where}: messages[{index}]"
        if not isinstance(entry, Mapping):
            raise DataError(f"{place} must be {{role, content}}, not {_short(entry)}")
        roles = [role.value for role in Role]
        if entry.get("role") not in roles:
            raise DataError(f"{place}: role is {_short(entry.get('role'))}; it must be one of {', '.join(roles)}")
        messages.append(Message(Role(entry["role"]), _text(entry, "content", place)))
    if messages[-1].role is not Role.assistant:
        raise DataError(f"{where}: the last message is the {messages[-1].role.value}'s; it must be the assistant's")
    return Conversation(tuple(messages), where)


FORMATS: dict[DataFormat, Callable[[Row, str], Conversation]] = {
    DataFormat.alpaca: from_alpaca,
    DataFormat.messages: from_messages,
}

#: The field by which ``auto`` knows a format.
MARKS: dict[str, DataFormat] = {"messages": DataFormat.messages, "instruction": DataFormat.alpaca}


def detect_format(row: Row, where: str) -> DataFormat:
    """The format of a file, by its first row.

    Raises:
        DataError: No format has these fields.
    """
    for field, data_format in MARKS.items():
        if field in row:
            return data_format
    raise DataError(
        f"{where}: cannot tell the format by the fields {', '.join(map(str, row)) or '(none)'}; "
        "alpaca has instruction/input/output, messages has messages"
    )


def _text(row: Row, field: str, where: str, required: bool = True) -> str:
    """A text field; empty and missing are the same, because CSV knows no difference."""
    value = row.get(field)
    if value is None or value == "":
        if not required:
            return ""
        state = "is empty" if field in row else f"is missing (the row has: {', '.join(map(str, row))})"
        raise DataError(f"{where}: the field {field!r} {state}")
    if not isinstance(value, str):
        raise DataError(f"{where}: the field {field!r} must be text, not {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
