"""The labels of a data set: their kind, their names, and the numbers that stand for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any


class Tags(tuple[str | int, ...]):
    """The tag of every word of a row."""

    __slots__ = ()


#: The label of a row, as its file has it: a class, a number, several of them, or tags.
Label = str | int | float | tuple[str | int | float, ...] | Tags

#: Stands for the label, or for each tag, of a row that is to be predicted.
UNKNOWN = ""


class LabelKind(Enum):
    """The kind of a row's label."""

    name = "class"
    """One class: a name or an integer."""
    names = "classes"
    """Any number of classes: a list of names or integers."""
    value = "value"
    """A real number, or a list of them."""
    tags = "tags"
    """A class for every word of the row."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The labels of a run. No labels: rows of text, whose own tokens are predicted."""

    kind: LabelKind | None = None
    names: tuple[str, ...] = ()
    """Names by number, as in ``id2label``; of values, one per output."""
    weights: tuple[float, ...] = field(default=())
    """Weight of each class in the loss; empty where all weigh the same."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Labels:
        """Build the labels from what JSON made of them."""
        kind = values.get("kind")
        return cls(
            kind=LabelKind(kind) if kind else None,
            names=tuple(values.get("names", ())),
            weights=tuple(values.get("weights", ())),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        kind = self.kind.value if self.kind else None
        return {"kind": kind, "names": list(self.names), "weights": list(self.weights)}

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Number of each class by its name, as in ``label2id``."""
        return {name: number for number, name in enumerate(self.names)}

    def encode(self, label: Label) -> int | list[int] | list[float]:
        """Turn a row's label into numbers.

        Returns:
            The number of its class; for several classes, 0 or 1 for each that there is; the
            values; or the number of each word's class.
        """
        if self.kind is LabelKind.name:
            return self.numbers[str(label)]
        several: Sequence[Any] = label if isinstance(label, tuple | list) else (label,)
        if self.kind is LabelKind.value:
            return [float(value) for value in several]
        numbers = [self.numbers[str(name)] for name in several]
        if self.kind is LabelKind.tags:
            return numbers
        return [float(number in numbers) for number in range(len(self.names))]


def label_to_json(label: Label) -> Any:
    """Return what JSON can hold of a label."""
    if isinstance(label, Tags):
        return {"tags": list(label)}
    return list(label) if isinstance(label, tuple) else label


def label_from_json(value: Any) -> Label:
    """Read what :func:`label_to_json` returned."""
    if isinstance(value, dict):
        return Tags(value["tags"])
    return tuple(value) if isinstance(value, list) else value
