"""A format of rows that nobody needs: ``{"pipe": "question | answer"}``."""

from __future__ import annotations

from llmtune.data.formats.format import FORMATS, RowFormat
from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.rows.problems import RowError
from llmtune.data.rows.values import Row, read_text


def _read(row: Row) -> Conversation:
    question, border, answer = read_text(row, "pipe").partition(" | ")
    if not border:
        raise RowError("there is no ' | ' between a question and its answer")
    return Conversation(
        messages=(
            Message(role=Role.user, content=question),
            Message(role=Role.assistant, content=answer),
        )
    )


FORMATS.register(
    RowFormat(
        name="pipe",
        read=_read,
        fields=frozenset({"pipe"}),
        marks=(frozenset({"pipe"}),),
        is_chat=True,
    )
)
