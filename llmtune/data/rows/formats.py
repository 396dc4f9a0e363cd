"""Row formats: each function turns one row into a conversation. A new format is one function and one entry below."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from llmtune.config.groups.data import DataFormat
from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.rows.fields import MASKED, REASONING, SPELLINGS, TRAINED, says_nothing_else
from llmtune.data.rows.problems import RowError, short
from llmtune.data.rows.tool_calls import parse_tool_calls, read_tool_calls, read_tools

Row = Mapping[str, Any]

#: Names of roles in the formats of the field; capitals mean nothing.
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
    "tool_call": Role.assistant,
    "tool": Role.tool,
    "function": Role.tool,
    "observation": Role.tool,
    "function_response": Role.tool,
    "tool_response": Role.tool,
}

#: Speakers whose words are the JSON of calls.
_CALLERS = ("function_call", "tool_call")

#: Who may say nothing: a system prompt that is switched off, and a tool that gives nothing back.
_MAY_BE_SILENT = (Role.system, Role.tool)

#: Fields of a message that go to the chat template as they are.
EXTRA = ("tool_call_id", "name")

_SWITCHES = frozenset((*TRAINED, *MASKED))


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
    return _from_turns(row, "conversations")


def from_messages(row: Row) -> Conversation:
    """``messages``: a list of ``{role, content}``, optionally with ``train``, ``tool_calls`` ...; and ``tools``."""
    return _from_turns(row, "messages")


def from_prompt_completion(row: Row) -> Conversation:
    """``prompt`` and ``completion``: two texts without a template, or two lists of messages with it."""
    if isinstance(row.get("prompt"), list | tuple):
        turns = [*_list(row, "prompt"), *_list(row, "completion")]
        asked = len(_list(row, "prompt"))
        # Only the completion is trained, also where the prompt holds earlier answers that do not say so.
        messages = [
            {**turn, "train": False} if index < asked and _is_answer(turn) and not _switches(turn) else turn
            for index, turn in enumerate(turns)
        ]
        return _from_turns({**row, "messages": messages}, "messages")
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


def _from_turns(row: Row, field: str) -> Conversation:
    entries = _list(row, field)
    messages: list[Message] = []
    system = _text(row, "system", required=False)
    if system:
        messages.append(Message(Role.system, system))
    calling = False
    for number, entry in enumerate(entries):
        place = f"{field}[{number}]"
        if not isinstance(entry, Mapping):
            raise RowError(f"{place} must be {{{', '.join(SPELLINGS[field == 'conversations'])}}}, not {short(entry)}")
        message, called = _to_message(entry, place)
        if called and calling and message.train == messages[-1].train:
            messages[-1] = _with_more_calls(messages[-1], message)
        else:
            messages.append(message)
        calling = called
    if messages[-1].role is not Role.assistant:
        raise RowError(f"the last message is the {messages[-1].role.value}'s; it must be the assistant's")
    tools = read_tools(row)
    for text in texts_within(tools) if tools else ():
        check_unicode(text, "tools")
    return Conversation(tuple(messages), tools=tools)


def _with_more_calls(message: Message, more: Message) -> Message:
    """Calls that were written as a turn each, although the model makes them in one."""
    calls = [*message.extra["tool_calls"], *more.extra["tool_calls"]]
    return replace(message, extra={**message.extra, **more.extra, "tool_calls": calls})


def _message_fields(entry: Row, place: str) -> tuple[str, str]:
    """The fields of a message that say who speaks and what: ``role`` and ``content``, or ``from`` and ``value``."""
    found = []
    for names in zip(*SPELLINGS, strict=True):
        given = [name for name in names if entry.get(name) is not None] or [name for name in names if name in entry]
        said = [_find_role(entry[name]) or entry[name] if names[0] == "role" else entry[name] for name in given]
        if len(given) > 1 and said[0] != said[1]:
            raise RowError(f"{place}: {given[0]!r} and {given[1]!r} say different things; keep one of them")
        found.append(given[0] if given else None)
    speaker = found[0] or "role"
    return speaker, found[1] or dict(SPELLINGS)[speaker]


def _find_role(name: Any) -> Role | None:
    return (ROLES.get(name) or ROLES.get(name.strip().lower())) if isinstance(name, str) else None


def _to_message(entry: Row, place: str) -> tuple[Message, bool]:
    """A message, and whether its words were the JSON of calls."""
    role_field, text_field = _message_fields(entry, place)
    name = entry.get(role_field)
    role = _find_role(name)
    if role is None:
        raise RowError(f"{place}: {role_field} is {short(name)}; it must be one of {', '.join(ROLES)}")
    called = str(name).strip().lower() in _CALLERS
    if called:
        calls = parse_tool_calls(_content(entry, text_field, place), place)
        entry = {**entry, text_field: "", "tool_calls": [*read_tool_calls(entry, place), *calls]}
    train = _says_train(entry, place)
    silent = role in _MAY_BE_SILENT and (text_field in entry or says_nothing_else(entry))
    if len(entry) == 2 and text_field in entry:
        # Nothing but who says what, as most messages are.
        return Message(role, _content(entry, text_field, place, silent), train), False
    # Arrow fills the fields that other rows have with nulls.
    extra: dict[str, Any] = {key: entry[key] for key in EXTRA if entry.get(key) not in (None, [], "")}
    if not isinstance(extra.get("name", ""), str):
        raise RowError(f"{place}: 'name' must be text, not {short(extra['name'])}")
    calls = read_tool_calls(entry, place)
    extra |= {"tool_calls": calls} if calls else {}
    thought = _reasoning(entry, place)
    extra |= thought
    for text in texts_within(extra) if extra else ():
        check_unicode(text, f"{place}: {', '.join(extra)}")
    return Message(role, _content(entry, text_field, place, silent or bool(calls or thought)), train, extra), called


def _reasoning(entry: Row, place: str) -> dict[str, str]:
    """What the model thought, under all names by which templates ask for it."""
    found = {name: entry[name] for name in REASONING if entry.get(name) not in (None, "", [])}
    for name, text in found.items():
        if not isinstance(text, str):
            raise RowError(f"{place}: {name!r} must be text, not {short(text)}")
    if len(set(found.values())) > 1:
        raise RowError(f"{place}: {' and '.join(found)} say different things; keep one of them")
    return {**found, **dict.fromkeys(("reasoning_content", "thinking"), text)} if found else {}


def _is_answer(turn: Any) -> bool:
    return isinstance(turn, Mapping) and Role.assistant in map(_find_role, (turn.get("role"), turn.get("from")))


def _switches(entry: Row) -> list[str]:
    """Fields by which a message says whether it is trained; Arrow fills in nulls."""
    return sorted(name for name in entry.keys() & _SWITCHES if entry[name] is not None)


def _says_train(entry: Row, place: str) -> bool | None:
    """Whether a message is trained, by whatever name it says so: ``train``, OpenAI's ``weight``, ``loss``, ``masked`` ...

    None where it says nothing.
    """
    said: dict[str, bool] = {}
    for name in _switches(entry):
        value = entry[name]
        if value not in (True, False):
            raise RowError(
                f"{place}: {name!r} must be true or false, not {short(value)}: a message is trained, or it is not"
            )
        said[name] = bool(value) is not (name in MASKED)
    if len(set(said.values())) > 1:
        raise RowError(f"{place}: {' and '.join(map(repr, said))} contradict each other; keep one of them")
    return next(iter(said.values()), None)


def _content(entry: Row, field: str, place: str, may_be_empty: bool = False) -> str:
    """Text, or a list of text parts."""
    value = entry.get(field)
    if isinstance(value, list):
        parts = []
        for part in value:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RowError(f"{place}: {field} holds {short(part)}; only text parts can be trained")
            parts.append(part["text"])
        value = "".join(parts)
    if may_be_empty and (value is None or (isinstance(value, str) and not value.strip())):
        return value or ""
    try:
        return _text({**entry, field: value} if field in entry else entry, field)
    except RowError as error:
        raise RowError(f"{place}: {error}") from error


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
