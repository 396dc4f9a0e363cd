"""``data=alpaca``: an instruction, perhaps with an input and turns before it, and an output."""

from __future__ import annotations

from typing import Any

from llmtune.data.formats.format import FORMATS, PromptFormat, RowFormat
from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.rows.problems import RowError, short
from llmtune.data.rows.values import Row, read_list, read_text


def _read(row: Row) -> Conversation:
    """Read ``instruction`` and ``output``, and optional ``input``, ``system`` and ``history``.

    ``history`` is ``[[question, answer], ...]``.
    """
    asked = _read_prompt(row).messages
    answer = Message(role=Role.assistant, content=read_text(row, "output"))
    return Conversation(messages=(*asked, answer))


def _read_prompt(row: Row) -> Conversation:
    """The same without ``output``."""
    instruction = read_text(row, "instruction")
    extra = read_text(row, "input", required=False)
    system = read_text(row, "system", required=False)
    messages = [Message(role=Role.system, content=system)] if system else []
    for index, turn in enumerate(_history(row)):
        if (
            not isinstance(turn, list | tuple)
            or len(turn) != 2
            or not all(isinstance(text, str) for text in turn)
        ):
            raise RowError(f"history[{index}] must be [question, answer], not {short(turn)}")
        messages += [
            Message(role=Role.user, content=turn[0]),
            Message(role=Role.assistant, content=turn[1]),
        ]
    messages.append(
        Message(role=Role.user, content=f"{instruction}\n\n{extra}" if extra else instruction)
    )
    return Conversation(messages=tuple(messages))


def _history(row: Row) -> list[Any]:
    history = row.get("history")
    # CSV knows no difference between empty and missing.
    blank = isinstance(history, str) and not history.strip()
    return [] if blank else read_list(row, "history", required=False)


FORMATS.register(
    RowFormat(
        name="alpaca",
        read=_read,
        fields=frozenset({"instruction", "input", "output", "system", "history"}),
        marks=(frozenset({"instruction"}),),
        priority=30,
        lists=("history",),
        is_chat=True,
        prompt=PromptFormat(
            read=_read_prompt, marks=(frozenset({"instruction"}),), lists=("history",)
        ),
    )
)
