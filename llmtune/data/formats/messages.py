"""``data=messages``: a list of turns with ``role`` and ``content``, as chat APIs have it."""

from __future__ import annotations

from llmtune.data.formats.format import FORMATS, PromptFormat, RowFormat
from llmtune.data.rows.conversation import Conversation
from llmtune.data.rows.turns import from_turns, prompt_from_turns
from llmtune.data.rows.values import Row


def _read(row: Row) -> Conversation:
    """Read ``messages`` and ``tools``.

    ``messages`` is a list of ``{role, content}``, optionally with ``train``, ``tool_calls`` ....
    """
    return from_turns(row, "messages")


def _read_prompt(row: Row) -> Conversation:
    """The same up to the last message that is not the assistant's."""
    return prompt_from_turns(row, "messages")


FORMATS.register(
    RowFormat(
        name="messages",
        read=_read,
        fields=frozenset({"messages", "system", "tools", "functions"}),
        marks=(frozenset({"messages"}),),
        priority=10,
        lists=("messages",),
        is_chat=True,
        prompt=PromptFormat(
            read=_read_prompt, marks=(frozenset({"messages"}),), lists=("messages",)
        ),
    )
)
