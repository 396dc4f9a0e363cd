"""``data=classification``: one text or two, and a label."""

from __future__ import annotations

from llmtune.data.formats.format import FORMATS, RowFormat
from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.rows.label_values import read_label
from llmtune.data.rows.values import Row, read_text


def _read(row: Row) -> Conversation:
    """Read ``text``, or ``sentence1`` and perhaps ``sentence2``; and ``label``.

    The label is a class (a name or an integer), a real number, or a list of either.
    """
    first = "text" if "text" in row else "sentence1"
    texts = [read_text(row, first)]
    if first == "sentence1" and row.get("sentence2") is not None:
        texts.append(read_text(row, "sentence2"))
    label = read_label(row, "label")
    return Conversation(
        messages=tuple(Message(role=Role.user, content=text) for text in texts),
        plain=True,
        label=label,
    )


FORMATS.register(
    RowFormat(
        name="classification",
        read=_read,
        fields=frozenset({"text", "sentence1", "sentence2", "label"}),
        marks=(frozenset({"sentence1"}), frozenset({"text", "label"})),
        priority=50,
        has_labels=True,
    )
)
