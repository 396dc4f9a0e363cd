"""``data=sharegpt``: a list of turns with ``from`` and ``value``."""

from __future__ import annotations

from llmtune.data.formats.format import FORMATS, PromptFormat, RowFormat
from llmtune.data.rows.conversation import Conversation
from llmtune.data.rows.turns import from_turns, prompt_from_turns
from llmtune.data.rows.values import Row


def _read(row: Row) -> Conversation:
    """Read ``conversations``, a list of ``{from, value}``, and optional ``system``, ``tools``."""
    return from_turns(row, "conversations")


def _read_prompt(row: Row) -> Conversation:
    """The same up to the last turn that is not the assistant's."""
    return prompt_from_turns(row, "conversations")


FORMATS.register(
    RowFormat(
        name="sharegpt",
        read=_read,
        fields=frozenset({"conversations", "system", "tools", "functions"}),
        marks=(frozenset({"conversations"}),),
        priority=20,
        lists=("conversations",),
        is_chat=True,
        prompt=PromptFormat(
            read=_read_prompt, marks=(frozenset({"conversations"}),), lists=("conversations",)
        ),
    )
)
