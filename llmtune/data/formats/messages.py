"""``data=messages``: a list of turns with ``role`` and ``content``, as chat APIs have it."""

from __future__ import annotations

from llmtune.data.formats.format import FORMATS, RowFormat
from llmtune.data.rows.conversation import Conversation
from llmtune.data.rows.turns import from_turns
from llmtune.data.rows.values import Row


def _read(row: Row) -> Conversation:
    """Read ``messages`` and ``tools``.

    ``messages`` is a list of ``{role, content}``, optionally with ``train``, ``tool_calls`` ....
    """
    return from_turns(row, "messages")


FORMATS.register(
    RowFormat(
        name="messages",
        read=_read,
        fields=frozenset({"messages", "system", "tools", "functions"}),
        marks=(frozenset({"messages"}),),
        priority=10,
        lists=("messages",),
        is_chat=True,
    )
)
