"""The interface of a format of rows, and the registry of formats.

A format is one file of this folder that registers one :class:`RowFormat`, and one YAML in
``conf/data/``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmtune.config.groups.data import AUTO
from llmtune.data.rows.conversation import Conversation
from llmtune.data.rows.problems import RowError
from llmtune.data.rows.values import Row
from llmtune.registry import Registry
from llmtune.task.labels import LabelKind


def _no_fields(_row: Row) -> frozenset[str]:
    return frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptFormat:
    """The reader of rows whose answer or label is to be predicted, and is not looked at."""

    read: Callable[[Row], Conversation]
    """Return the part of a row that the model is given; raises RowError."""
    marks: tuple[frozenset[str], ...]
    """Sets of fields by any of which a row of this format is known."""
    lists: tuple[str, ...] = ()
    """Fields that hold lists, also as JSON text."""
    label_kinds: tuple[LabelKind | None, ...] = (None,)
    """Kinds of labels that are predicted of its rows; None stands for text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFormat:
    """One format of rows."""

    name: str
    """Its value of ``data.format``."""
    read: Callable[[Row], Conversation]
    """Reads the conversation of a row; raises RowError."""
    fields: frozenset[str]
    """The fields that it reads; all others are looked at by ``data/rows/fields.py``."""
    marks: tuple[frozenset[str], ...] = ()
    """Sets of fields; ``auto`` recognizes a row of this format by any of them."""
    priority: int = 0
    """Marks of formats with a lower one are looked for first."""
    lists: tuple[str, ...] = ()
    """Fields that hold lists of messages or turns, also as JSON text."""
    lists_may_be_texts: bool = False
    """JSON text in them is taken for lists only where all of them are lists of messages."""
    more_fields: Callable[[Row], frozenset[str]] = _no_fields
    """Returns further fields that it reads of a row, beside ``fields``."""
    is_chat: bool = False
    """Its rows always go through the chat template."""
    has_labels: bool = False
    """Its rows are texts with a label to predict, and without an answer to write."""
    prompt: PromptFormat | None = None
    """Reader of rows for ``predict``; None where it does not take them."""

    def __post_init__(self) -> None:
        for names in (self.fields, *self.marks):
            if not isinstance(names, frozenset):
                raise TypeError(
                    f"fields, and each of marks, of the format {self.name} must be a frozenset of"
                    f" names, not {names!r}"
                )


FORMATS: Registry[RowFormat] = Registry(
    "data.format", "llmtune.data.formats", also=(AUTO,), interface=RowFormat
)


def has_marks(row: Row) -> bool:
    """Tell whether ``auto`` knows the format of a row."""
    return any(fields <= row.keys() for kind in FORMATS.list().values() for fields in kind.marks)


def detect_format(row: Row) -> RowFormat:
    """Return the format of a source, by its first row.

    Raises:
        RowError: No format has these fields.
    """
    marks = [(fields, kind) for kind in _by_priority() for fields in kind.marks]
    for fields, kind in marks:
        if fields <= row.keys():
            return kind
    described = "; ".join(f"{kind.name} has {'/'.join(sorted(fields))}" for fields, kind in marks)
    raise RowError(
        f"cannot tell the format by the fields {', '.join(map(str, row)) or '(none)'}: {described}."
        " Name columns with fields= of the source"
    )


def detect_prompt_format(row: Row, kind: LabelKind | None) -> RowFormat:
    """The format of a source to be predicted, by its first row.

    Args:
        kind: Of the labels that the model tells; None of a language model.

    Raises:
        RowError: No format whose rows such a model takes has these fields.
    """
    marks: list[tuple[frozenset[str], RowFormat]] = []
    for one in _by_priority():
        if one.prompt is not None and kind in one.prompt.label_kinds:
            marks += [(fields, one) for fields in one.prompt.marks]
    for fields, one in marks:
        if fields <= row.keys():
            return one
    described = " or ".join("/".join(sorted(fields)) for fields, _ in marks)
    raise RowError(
        f"the model needs a field {described}, and the row has {', '.join(map(str, row))}: name"
        " columns with fields= of the source, such as {path: FILE, fields: {text: COLUMN}}"
    )


def _by_priority() -> list[RowFormat]:
    return sorted(FORMATS.list().values(), key=lambda kind: (kind.priority, kind.name))
