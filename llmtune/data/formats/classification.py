"""``data=classification``: one text or two, and a label."""

from __future__ import annotations

from llmtune.data.formats.format import FORMATS, PromptFormat, RowFormat
from llmtune.data.rows.conversation import Conversation, Message, Role
from llmtune.data.rows.label_values import read_label
from llmtune.data.rows.values import Row, read_text
from llmtune.task.labels import UNKNOWN, Label, LabelKind


def _read(row: Row) -> Conversation:
    """Read ``text``, or ``sentence1`` and perhaps ``sentence2``; and ``label``.

    The label is a class (a name or an integer), a real number, or a list of either.
    """
    texts = _read_texts(row)
    return _to_conversation(texts, read_label(row, "label"))


def _read_prompt(row: Row) -> Conversation:
    """The same without ``label``."""
    return _to_conversation(_read_texts(row), UNKNOWN)


def _read_texts(row: Row) -> list[str]:
    first = "text" if "text" in row else "sentence1"
    texts = [read_text(row, first)]
    if first == "sentence1" and row.get("sentence2") is not None:
        texts.append(read_text(row, "sentence2"))
    return texts


def _to_conversation(texts: list[str], label: Label) -> Conversation:
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
        prompt=PromptFormat(
            read=_read_prompt,
            marks=(frozenset({"sentence1"}), frozenset({"text"})),
            label_kinds=(LabelKind.name, LabelKind.names, LabelKind.value),
        ),
    )
)
