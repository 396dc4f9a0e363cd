"""Row formats: each function turns one row into a conversation. A new format is one function and one entry below."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llmtune.config.data_schema import DataFormat
from llmtune.data.conversation import Conversation, Message, Role
from llmtune.data.problems import RowError

Row = Mapping[str, Any]

#: Names of roles in the formats of the field.
ROLES = {
    "system": Role.system,
    "developer": Role.system,
    "user": Role.user,
    "human": Role.user,
    "assistant": Role.assistant,
    "gpt": Role.assistant,
    "model": Role.assistant,
    "chatgpt": Role.assistant,
    "function_call": Role.assistant,
    "tool": Role.tool,
    "function": Role.tool,
    "observation": Role.tool,
    "function_response": Role.tool,
}

#: Fields of a message that go to the chat template as they are.
EXTRA = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")


def from_alpaca(row: Row) -> Conversation:
    """``instruction``, optional ``input``, ``system`` and ``history`` ([[question, answer], ...]), and ``output``."""
    instruction = _text(row, "instruction")
    extra = _text(row, "input", required=False)
    system = _text(row, "system", required=False)
    messages = [Message(Role.system, system)] if system else []
    for number, turn in enumerate(_list(row, "history", required=False)):
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise RowError(f"history[{number}] must be [question, answer], not {short(turn)}")
        messages += [Message(Role.user, turn[0]), Message(Role.assistant, turn[1])]
    messages.append(Message(Role.user, f"{instruction}\n\n{extra}" if extra else instruction))
    messages.append(Message(Role.assistant, _text(row, "output")))
    return Conversation(tuple(messages))


def from_sharegpt(row: Row) -> Conversation:
    """``conversations``: a list of ``{from, value}``; optional ``system`` and ``tools`` beside it."""
    return _from_turns(row, "conversations", "from", "value")


def from_messages(row: Row) -> Conversation:
    """``messages``: a list of ``{role, content}``, optionally with ``train``, ``tool_calls`` ...; and ``tools``."""
    return _from_turns(row, "messages", "role", "content")


def from_prompt_completion(row: Row) -> Conversation:
    """``prompt`` and ``completion``: two texts without a template, or two lists of messages with it."""
    if isinstance(row.get("prompt"), list | tuple):
        turns = [*_list(row, "prompt"), *_list(row, "completion")]
        asked = len(_list(row, "prompt"))
        # Only the completion is trained, also where the prompt holds earlier answers.
        messages = [
            {**turn, "train": False} if index < asked and isinstance(turn, Mapping) and _unsaid(turn) else turn
            for index, turn in enumerate(turns)
        ]
        return _from_turns({**row, "messages": messages}, "messages", "role", "content")
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    return Conversation((Message(Role.user, prompt), Message(Role.assistant, completion)), plain=True)


def from_text(row: Row) -> Conversation:
    """``text``, trained whole: continued pre-training."""
    return Conversation((Message(Role.assistant, _text(row, "text")),), plain=True)


def from_classification(row: Row) -> Conversation:
    """``text``, or ``sentence1`` and perhaps ``sentence2``; and ``label``: a class name, a class number or a value."""
    first = "text" if "text" in row else "sentence1"
    texts = [_text(row, first)]
    if first == "sentence1" and row.get("sentence2") is not None:
        texts.append(_text(row, "sentence2"))
    label = row.get("label")
    if label is None or label == "":
        raise RowError("the field 'label' is empty" if "label" in row else _missing(row, "label"))
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise RowError(f"the field 'label' must be text or a number, not {short(label)}")
    return Conversation(tuple(Message(Role.user, text) for text in texts), plain=True, label=label)


FORMATS: dict[DataFormat, Callable[[Row], Conversation]] = {
    DataFormat.alpaca: from_alpaca,
    DataFormat.sharegpt: from_sharegpt,
    DataFormat.messages: from_messages,
    DataFormat.prompt_completion: from_prompt_completion,
    DataFormat.text: from_text,
    DataFormat.classification: from_classification,
}

#: Formats whose rows always go through the chat template.
CHAT_FORMATS = {DataFormat.alpaca, DataFormat.sharegpt, DataFormat.messages}

#: Fields by which ``auto`` knows a format; the first entry whose fields are all there.
MARKS: list[tuple[frozenset[str], DataFormat]] = [
    (frozenset({"messages"}), DataFormat.messages),
    (frozenset({"conversations"}), DataFormat.sharegpt),
    (frozenset({"instruction"}), DataFormat.alpaca),
    (frozenset({"prompt", "completion"}), DataFormat.prompt_completion),
    (frozenset({"sentence1"}), DataFormat.classification),
    (frozenset({"text", "label"}), DataFormat.classification),
    (frozenset({"text"}), DataFormat.text),
]


def detect_format(row: Row) -> DataFormat:
    """The format of a source, by its first row.

    Raises:
        RowError: No format has these fields.
    """
    for fields, data_format in MARKS:
        if fields <= row.keys():
            return data_format
    known = "; ".join(f"{data_format.value} has {'/'.join(sorted(fields))}" for fields, data_format in MARKS)
    raise RowError(
        f"cannot tell the format by the fields {', '.join(map(str, row)) or '(none)'}: {known}. "
        "Name columns with fields= of the source"
    )


def rename(row: Row, fields: Mapping[str, str]) -> Row:
    """The row with its columns under the names that formats know.

    Args:
        fields: Name of the format -> name in the row.
    """
    if not fields:
        return row
    missing = [name for name in fields.values() if name not in row]
    if missing:
        raise RowError(_missing(row, missing[0]))
    taken = set(fields.values())
    return {**{key: row[key] for key in row if key not in taken}, **{key: row[name] for key, name in fields.items()}}


def _from_turns(row: Row, field: str, role_field: str, text_field: str) -> Conversation:
    entries = _list(row, field)
    messages = []
    system = _text(row, "system", required=False)
    if system:
        messages.append(Message(Role.system, system))
    for number, entry in enumerate(entries):
        place = f"{field}[{number}]"
        if not isinstance(entry, Mapping):
            raise RowError(f"{place} must be {{{role_field}, {text_field}}}, not {short(entry)}")
        messages.append(_to_message(entry, place, role_field, text_field))
    if messages[-1].role is not Role.assistant:
        raise RowError(f"the last message is the {messages[-1].role.value}'s; it must be the assistant's")
    return Conversation(tuple(messages), tools=_tools(row))


def _to_message(entry: Row, place: str, role_field: str, text_field: str) -> Message:
    name = entry.get(role_field)
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise RowError(f"{place}: {role_field} is {short(name)}; it must be one of {', '.join(ROLES)}")
    # Arrow fills the fields that other rows have with nulls.
    extra = {key: entry[key] for key in EXTRA if entry.get(key) not in (None, [], "")}
    for text in texts_within(extra) if extra else ():
        check_unicode(text, f"{place}: {', '.join(extra)}")
    if name == "function_call":
        return Message(
            role, "", _train(entry, place), {**extra, "tool_calls": [_function_call(entry, place, text_field)]}
        )
    if entry.get(text_field) in (None, "") and "tool_calls" in extra:
        return Message(role, "", _train(entry, place), extra)
    return Message(role, _content(entry, text_field, place), _train(entry, place), extra)


def _unsaid(entry: Row) -> bool:
    """Whether a message does not say if it is trained; Arrow fills in nulls."""
    return entry.get("train") is None and entry.get("weight") is None


def _train(entry: Row, place: str) -> bool:
    """``train``, or OpenAI's ``weight`` of 0 or 1."""
    train = entry.get("train")
    train = entry.get("weight") if train is None else train
    if train is None:
        return True
    if train not in (True, False, 0, 1):
        raise RowError(f"{place}: 'train' must be true or false, not {short(train)}")
    return bool(train)


def _content(entry: Row, field: str, place: str) -> str:
    """Text, or a list of text parts."""
    value = entry.get(field)
    if isinstance(value, list):
        parts = []
        for part in value:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RowError(f"{place}: {field} holds {short(part)}; only text parts can be trained")
            parts.append(part["text"])
        value = "".join(parts)
    try:
        return _text({**entry, field: value}, field)
    except RowError as error:
        raise RowError(f"{place}: {error}") from error


def _function_call(entry: Row, place: str, text_field: str) -> dict[str, Any]:
    text = _content(entry, text_field, place)
    try:
        call = json.loads(text)
        return {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
    except (ValueError, TypeError, KeyError) as error:
        raise RowError(f"{place}: a function_call must be JSON with name and arguments, not {short(text)}") from error


def _tools(row: Row) -> tuple[dict[str, Any], ...]:
    tools = row.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise RowError(f"'tools' is no JSON: {short(tools)}") from error
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"'tools' must be a list of function schemas, not {short(tools)}")
    for text in texts_within(tools):
        check_unicode(text, "tools")
    return tuple(tools)


def _list(row: Row, field: str, required: bool = True) -> list[Any]:
    value = row.get(field)
    if value is None and not required:
        return []
    if field not in row:
        raise RowError(_missing(row, field))
    if not isinstance(value, list | tuple) or (required and not value):
        raise RowError(f"{field!r} must be a list with something in it, not {short(value)}")
    return list(value)


def _text(row: Row, field: str, required: bool = True) -> str:
    """A text field; empty and missing are the same, because CSV knows no difference."""
    value = row.get(field)
    if value is None or value == "":
        if not required:
            return ""
        raise RowError(f"the field {field!r} is empty" if field in row else _missing(row, field))
    if not isinstance(value, str):
        raise RowError(f"the field {field!r} must be text, not {short(value)}")
    if required and not value.strip():
        raise RowError(f"the field {field!r} has nothing but white space")
    if not value.isascii():
        check_unicode(value, field)
    return value


def texts_within(value: Any) -> Iterator[str]:
    """Every text in nested lists and mappings, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from texts_within(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_within(item)


def check_unicode(value: str, field: str) -> None:
    """Refuse what no tokenizer reads: bytes that were no UTF-8, and halves of surrogate pairs, which JSON can spell.

    Raises:
        RowError: There is one.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        # Where readers put a byte that they could not decode.
        if 0xDC80 <= code <= 0xDCFF:
            raise RowError(not_utf8(code - 0xDC00)) from error
        raise RowError(
            f"the field {field!r} has half a surrogate pair, \\u{code:04x}, which is no character"
        ) from error


def not_utf8(byte: int) -> str:
    """What is said of other encodings."""
    return f"not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8"


def _missing(row: Row, field: str) -> str:
    return f"the field {field!r} is missing (the row has: {', '.join(map(str, row))})"


def short(value: Any) -> str:
    """A value for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
