"""Read turns of a conversation in their common forms: speaker, contents, and what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.rows.fields import MASKED, REASONING, SPELLINGS, TRAINED, says_nothing_else
from llmtune.data.rows.problems import RowError, short
from llmtune.data.rows.tool_calls import parse_tool_calls, read_tool_calls, read_tools
from llmtune.data.rows.values import Row, check_unicode, read_list, read_text, texts_within

#: Names of roles in common formats; capitals mean nothing.
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

#: Roles whose words may be empty: a system prompt that is switched off, and a tool without a
#: result.
_MAY_BE_SILENT = (Role.system, Role.tool)

#: Fields of a message that go to the chat template as they are.
EXTRA = ("tool_call_id", "name")

_SWITCHES = frozenset((*TRAINED, *MASKED))


def from_turns(row: Row, field: str) -> Conversation:
    """Make the conversation of a list of turns, with the system message and the tools beside it.

    Raises:
        RowError: The turns are none, or the last one is not the assistant's.
    """
    conversation = _read_turns(row, field, read_list(row, field))
    last = conversation.messages[-1].role
    if last is not Role.assistant:
        raise RowError(f"the last message is the {last.value}'s; it must be the assistant's")
    return conversation


def prompt_from_turns(row: Row, field: str) -> Conversation:
    """The conversation up to the last turn that is not the assistant's, for the model to answer.

    Raises:
        RowError: The turns are none, or all are the assistant's.
    """
    entries = read_list(row, field)
    while entries and is_answer(entries[-1]):
        entries.pop()
    if not entries:
        raise RowError(f"all of {field!r} is the assistant's: there is nothing to answer")
    return _read_turns(row, field, entries)


def _read_turns(row: Row, field: str, entries: list[Any]) -> Conversation:
    messages: list[Message] = []
    system = read_text(row, "system", required=False)
    if system:
        messages.append(Message(role=Role.system, content=system))
    calling = False
    for index, entry in enumerate(entries):
        location = f"{field}[{index}]"
        if not isinstance(entry, Mapping):
            raise RowError(
                f"{location} must be {{{', '.join(SPELLINGS[field == 'conversations'])}}}, not"
                f" {short(entry)}"
            )

        # Calls that were written as a turn each belong to one message.
        message, called = _to_message(entry, location)
        if called and calling and message.train == messages[-1].train:
            messages[-1] = _with_more_calls(messages[-1], message)
        else:
            messages.append(message)
        calling = called
    tools = read_tools(row)
    for text in texts_within(tools):
        check_unicode(text, "tools")
    return Conversation(messages=tuple(messages), tools=tools)


def _with_more_calls(message: Message, more: Message) -> Message:
    """Join calls that were written as a turn each, although the model makes them in one."""
    calls = [*message.extra["tool_calls"], *more.extra["tool_calls"]]
    return replace(message, extra={**message.extra, **more.extra, "tool_calls": calls})


def _message_fields(entry: Row, location: str) -> tuple[str, str]:
    """Return the names of speaker and contents: ``role content``, or ``from value``."""
    found = []
    for names in zip(*SPELLINGS, strict=True):
        given = [name for name in names if entry.get(name) is not None] or [
            name for name in names if name in entry
        ]
        said = [
            _find_role(entry[name]) or entry[name] if names[0] == "role" else entry[name]
            for name in given
        ]
        if len(given) > 1 and said[0] != said[1]:
            raise RowError(
                f"{location}: {given[0]!r} and {given[1]!r} say different things; keep one of them"
            )
        found.append(given[0] if given else None)
    speaker = found[0] or "role"
    return speaker, found[1] or dict(SPELLINGS)[speaker]


def _find_role(name: Any) -> Role | None:
    return (ROLES.get(name) or ROLES.get(name.strip().lower())) if isinstance(name, str) else None


def _to_message(entry: Row, location: str) -> tuple[Message, bool]:
    """Return a message, and whether its words were the JSON of calls."""
    role_field, text_field = _message_fields(entry, location)
    name = entry.get(role_field)
    role = _find_role(name)
    if role is None:
        raise RowError(
            f"{location}: {role_field} is {short(name)}; it must be one of {', '.join(ROLES)}"
        )

    # A turn of calls has their JSON in the place of its words.
    called = str(name).strip().lower() in _CALLERS
    if called:
        calls = parse_tool_calls(_content(entry, text_field, location), location)
        entry = {**entry, text_field: "", "tool_calls": [*read_tool_calls(entry, location), *calls]}
    train = _says_train(entry, location)
    silent = role in _MAY_BE_SILENT and (text_field in entry or says_nothing_else(entry))
    if len(entry) == 2 and text_field in entry:
        # Most messages have only a speaker and contents.
        return Message(
            role=role, content=_content(entry, text_field, location, silent), train=train
        ), False
    # Arrow fills the fields that other rows have with nulls.
    extra: dict[str, Any] = {
        key: entry[key] for key in EXTRA if entry.get(key) not in (None, [], "")
    }
    if not isinstance(extra.get("name", ""), str):
        raise RowError(f"{location}: 'name' must be text, not {short(extra['name'])}")
    calls = read_tool_calls(entry, location)
    extra |= {"tool_calls": calls} if calls else {}
    thought = _reasoning(entry, location)
    extra |= thought
    for text in texts_within(extra):
        check_unicode(text, f"{location}: {', '.join(extra)}")
    return (
        Message(
            role=role,
            content=_content(entry, text_field, location, silent or bool(calls or thought)),
            train=train,
            extra=extra,
        ),
        called,
    )


def _reasoning(entry: Row, location: str) -> dict[str, str]:
    """Return the reasoning of a message, under all names by which templates ask for it."""
    found = {name: entry[name] for name in REASONING if entry.get(name) not in (None, "", [])}
    for name, text in found.items():
        if not isinstance(text, str):
            raise RowError(f"{location}: {name!r} must be text, not {short(text)}")
    if len(set(found.values())) > 1:
        raise RowError(f"{location}: {' and '.join(found)} say different things; keep one of them")
    return {**found, **dict.fromkeys(("reasoning_content", "thinking"), text)} if found else {}


def is_answer(turn: Any) -> bool:
    """Tell whether a turn is the assistant's."""
    return isinstance(turn, Mapping) and Role.assistant in map(
        _find_role, (turn.get("role"), turn.get("from"))
    )


def list_switches(entry: Row) -> list[str]:
    """Return the fields by which a message says whether it is trained; Arrow fills in nulls."""
    return sorted(name for name in entry.keys() & _SWITCHES if entry[name] is not None)


def _says_train(entry: Row, location: str) -> bool | None:
    """Read whether a message is trained; None where it does not say.

    It may say so by many names: ``train``, OpenAI's ``weight``, ``loss``, ``masked`` ...
    """
    said: dict[str, bool] = {}
    for name in list_switches(entry):
        value = entry[name]
        if value not in (True, False):
            raise RowError(
                f"{location}: {name!r} must be true or false, not {short(value)}: a message is"
                " trained, or it is not"
            )
        said[name] = bool(value) is not (name in MASKED)
    if len(set(said.values())) > 1:
        raise RowError(
            f"{location}: {' and '.join(map(repr, said))} contradict each other; keep one of them"
        )
    return next(iter(said.values()), None)


def _content(entry: Row, field: str, location: str, may_be_empty: bool = False) -> str:
    """Return the text, or the joined list of text parts."""
    value = entry.get(field)
    if isinstance(value, list):
        parts = []
        for part in value:
            if (
                not isinstance(part, Mapping)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise RowError(
                    f"{location}: {field} holds {short(part)}; only text parts can be trained"
                )
            parts.append(part["text"])
        value = "".join(parts)
    if may_be_empty and (value is None or (isinstance(value, str) and not value.strip())):
        return value or ""
    try:
        return read_text({**entry, field: value} if field in entry else entry, field)
    except RowError as error:
        raise RowError(f"{location}: {error}") from error
