"""The table of an evaluation: what was taken for what, and the scores of each class."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llmtune.metrics.classification import count_classes
from llmtune.metrics.counts import Counts, mean, weighted_mean
from llmtune.metrics.entities import count_entities
from llmtune.metrics.multilabel import count_labels, sum_label_counts
from llmtune.storage.plain_json import parse_json

if TYPE_CHECKING:
    from torch import Tensor

#: Raised when the meaning of a field changes.
_VERSION = 1


class TableKind(StrEnum):
    """The kind of what is counted."""

    CLASSES = "classes"
    """Rows with one class each. Shape (true classes, predicted classes)."""
    LABELS = "labels"
    """Rows with a set of labels each.

    Shape (labels, without or with it, not predicted or predicted).
    """
    ENTITIES = "entities"
    """Entities of tagged tokens. Shape (types, 3): right, predicted, true."""


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """The scores of a class, or an average of them."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    """True occurrences."""


@dataclass(frozen=True, kw_only=True)
class ConfusionTable:
    """The counts of an evaluation, from which its scores follow.

    Raises:
        ValueError: The counts have another shape than the kind and the names say.
    """

    kind: TableKind
    names: tuple[str, ...]
    """The names of the classes, labels or types, in the order of the counts."""
    counts: tuple[Any, ...]
    """Nested tuples of integers; the kind says which shape."""

    def __post_init__(self) -> None:
        size = len(self.names)
        shape = {
            TableKind.CLASSES: (size, size),
            TableKind.LABELS: (size, 2, 2),
            TableKind.ENTITIES: (size, 3),
        }[self.kind]
        _check_shape(self.counts, shape)

    @classmethod
    def of_classes(cls, logits: Tensor, labels: Tensor, names: Sequence[str]) -> ConfusionTable:
        """Count rows with one class each.

        Args:
            logits: Shape (rows, classes).
            labels: Class indices, shape (rows,).
            names: The names of the classes.

        Raises:
            ValueError: A label is not one of the classes.
        """
        counts = count_classes(logits, labels)
        return cls(kind=TableKind.CLASSES, names=tuple(names), counts=counts)

    @classmethod
    def of_labels(cls, logits: Tensor, targets: Tensor, names: Sequence[str]) -> ConfusionTable:
        """Count rows with a set of labels each.

        Args:
            logits: Shape (rows, labels).
            targets: 0 or 1, shape (rows, labels).
            names: The names of the labels.

        Raises:
            ValueError: A target is neither 0 nor 1.
        """
        counts = count_labels(logits, targets)
        return cls(kind=TableKind.LABELS, names=tuple(names), counts=counts)

    @classmethod
    def of_tags(
        cls, predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]
    ) -> ConfusionTable:
        """Count the entities of tagged tokens; the names are the types that are in either.

        Args:
            predicted: The names of the tags of each row's words.
            true: The same shape.

        Raises:
            ValueError: A row has more tags in one than in the other.
        """
        names, counts = count_entities(predicted, true)
        rows = tuple(zip(counts.correct, counts.predicted, counts.true, strict=True))
        return cls(kind=TableKind.ENTITIES, names=names, counts=rows)

    @classmethod
    def from_json(cls, text: str | bytes) -> ConfusionTable:
        """Read a table from what :meth:`to_json` wrote; scores are computed again.

        Raises:
            ValueError: It is no such table, or one of another version.
        """
        try:
            fields = parse_json(text)
            if fields["version"] != _VERSION:
                raise ValueError(f"version {fields['version']}, not {_VERSION}")
            return cls(
                kind=TableKind(fields["kind"]),
                names=tuple(map(str, fields["names"])),
                counts=_freeze(fields["counts"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no confusion table ({type(error).__name__}: {error})") from None

    def to_json(self) -> str:
        """Write the table, its scores and their averages as JSON, with one row of counts a line."""
        fields: dict[str, Any] = {"version": _VERSION, "kind": self.kind}
        fields |= {"names": self.names, "counts": self.counts}
        fields["per_class"] = [asdict(row) for row in self.scores]
        fields["averages"] = [asdict(row) for row in self.averages]
        return f"{_to_lines(fields)}\n"

    @cached_property
    def scores(self) -> tuple[ScoreRow, ...]:
        """The scores of each class, in the order of the names."""
        return _score(self.names, self.sums)

    @cached_property
    def averages(self) -> tuple[ScoreRow, ...]:
        """The ``macro``, ``micro`` and ``weighted`` averages; weights are the supports.

        The macro average of classes is over those that are true or predicted at least once, as that
        of ``eval_f1`` is; that of labels is over all of them.
        """
        sums = self.sums
        (micro,) = _score(("micro",), sums.total())
        averaged = sums if self.kind is TableKind.LABELS else sums.present()
        macro = ScoreRow(
            name="macro",
            precision=mean(averaged.precision()),
            recall=mean(averaged.recall()),
            f1=mean(averaged.f1()),
            support=micro.support,
        )
        weighted = ScoreRow(
            name="weighted",
            precision=weighted_mean(sums.precision(), sums.true),
            recall=weighted_mean(sums.recall(), sums.true),
            f1=weighted_mean(sums.f1(), sums.true),
            support=micro.support,
        )
        return macro, micro, weighted

    @cached_property
    def sums(self) -> Counts:
        """Numbers of each class that were right, predicted and true."""
        if self.kind is TableKind.CLASSES:
            return Counts.from_matrix(self.counts)
        if self.kind is TableKind.LABELS:
            return sum_label_counts(self.counts)
        correct, predicted, true = zip(*self.counts, strict=True) if self.counts else ((), (), ())
        return Counts(correct, predicted, true)


def _score(names: Sequence[str], sums: Counts) -> tuple[ScoreRow, ...]:
    columns = zip(names, sums.precision(), sums.recall(), sums.f1(), sums.true, strict=True)
    return tuple(
        ScoreRow(name=name, precision=precision, recall=recall, f1=f1, support=support)
        for name, precision, recall, f1, support in columns
    )


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def _check_shape(counts: Any, shape: tuple[int, ...]) -> None:
    """Check that nested tuples hold integers from 0 on, and how many.

    Raises:
        ValueError: They do not.
    """
    if not shape:
        if type(counts) is not int or counts < 0:
            raise ValueError(f"{counts!r} is no count")
        return
    if not isinstance(counts, tuple) or len(counts) != shape[0]:
        raise ValueError(f"counts of another shape than {shape}")
    for part in counts:
        _check_shape(part, shape[1:])


def _to_lines(fields: dict[str, Any]) -> str:
    """Write an object as JSON, with one line for each item of its lists."""
    texts = []
    for name, value in fields.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, tuple | list) and value:
            items = ",\n  ".join(json.dumps(item, ensure_ascii=False) for item in value)
            text = f"[\n  {items}\n ]"
        texts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(texts) + "\n}"
