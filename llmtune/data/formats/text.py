"""``data=text``: texts that are trained whole, for continued pre-training."""

from __future__ import annotations

from llmtune.data.formats.format import FORMATS, PromptFormat, RowFormat
from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.rows.values import Row, read_text


def _read(row: Row) -> Conversation:
    """Read ``text``, which is trained whole."""
    return Conversation(
        messages=(Message(role=Role.assistant, content=read_text(row, "text")),), plain=True
    )


def _read_prompt(row: Row) -> Conversation:
    """``text``, which is continued."""
    message = Message(role=Role.user, content=read_text(row, "text"))
    return Conversation(messages=(message,), plain=True)


FORMATS.register(
    RowFormat(
        name="text",
        read=_read,
        fields=frozenset({"text"}),
        marks=(frozenset({"text"}),),
        priority=60,
        prompt=PromptFormat(read=_read_prompt, marks=(frozenset({"text"}),)),
    )
)
