"""The labels of the rows: their kind, their classes, and what is wrong with them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmtune.data.rows.problems import Problem, format_location, short
from llmtune.data.store.token_store import Rows, TokenStore
from llmtune.errors import DataError
from llmtune.task.labels import Label, LabelKind, Labels, Tags

#: A name of a class, as the rows have it.
Class = str | int

#: More classes than this are no classes.
MAX_CLASSES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSummary:
    """The labels of the training rows."""

    kind: LabelKind
    classes: list[Any]
    """The classes, integers before names, in order; of values, none."""
    counts: list[int]
    """Rows, or words, of each class."""
    outputs: int
    """Classes, or values per row."""


def summarize_labels(train: Rows, as_numbers: bool = False) -> LabelSummary | None:
    """Summarize the labels of the training rows; None where rows have none.

    Args:
        as_numbers: Whole numbers are values too, also where they are text.

    Raises:
        DataError: There are too many classes.
    """
    if not train.labels:
        return None
    kind = LabelKind.value if as_numbers else find_kind(train.labels)
    if kind is LabelKind.value:
        first: Any = train.labels[0]
        outputs = len(first) if isinstance(first, tuple) else 1
        return LabelSummary(kind=kind, classes=[], counts=[], outputs=outputs)
    counts = Counter(name for label in train.labels for name in classes_of(label))
    if len(counts) > MAX_CLASSES:
        raise DataError(
            f"the labels are of {len(counts):,} classes, more than {MAX_CLASSES:,}, such as"
            f" {', '.join(short(name) for name in list(counts)[:3])}: are they numbers, for"
            " model.task=regression, or texts to be written?"
        )
    classes = sort_classes(counts)
    return LabelSummary(
        kind=kind,
        classes=classes,
        counts=[counts[name] for name in classes],
        outputs=len(classes),
    )


def find_kind(labels: Sequence[Label]) -> LabelKind:
    """Find the kind of labels that are not mixed."""
    if isinstance(labels[0], Tags):
        return LabelKind.tags
    several = isinstance(labels[0], tuple)
    for label in labels:
        items = label if isinstance(label, tuple) else (label,)
        if any(isinstance(item, float) for item in items):
            return LabelKind.value
    return LabelKind.names if several else LabelKind.name


def classes_of(label: Label) -> Sequence[Class]:
    """List the classes of a row: one, several, or those of its words."""
    several: Any = label if isinstance(label, tuple) else (label,)
    return list(several)


def sort_classes(classes: Any) -> list[Class]:
    """Sort the names of classes: integers by value, also where they are text; names as text."""
    if all(isinstance(name, int) or name.lstrip("-").isdecimal() for name in classes):
        return sorted(classes, key=int)
    return sorted(classes, key=lambda name: (isinstance(name, str), name))


def find_label_problems(train: Rows, evaluation: Rows) -> Iterator[Problem]:
    """Find what is wrong with the labels of rows that are not mixed.

    One class only, a class that is evaluated and never trained, lists of values that differ in
    length.
    """
    if not train.labels or not all(len(rows.labels) == len(rows) for rows in (train, evaluation)):
        return
    kind = find_kind(train.labels)
    if kind is LabelKind.value:
        yield from _find_lengths(train, evaluation)
        return
    if kind is LabelKind.names:
        yield from _find_repeated(train, evaluation)
    known = {name for label in train.labels for name in classes_of(label)}
    if len(known) < 2:
        which = f"the class {short(next(iter(known)))}" if known else "no class"
        yield Problem(
            *train.location(0),
            f"every row has {which}, so that there is nothing to tell apart",
        )
    # As text: 1.0 is not the class 1, although Python says that they are equal.
    texts = set(map(str, known))
    for row, label in enumerate(evaluation.labels):
        new = [name for name in classes_of(label) if str(name) not in texts]
        if new:
            yield Problem(
                *evaluation.location(row),
                f"the class {short(new[0])} is in no training row, so that it could never be"
                " told; correct it, or take the row out",
            )


def have_numbers(stores: Sequence[TokenStore]) -> bool:
    """Tell whether some label is a number, or a text that says one."""
    return any(map(_are_numbers, itertools.chain.from_iterable(store.labels for store in stores)))


def find_number_problems(train: Rows, evaluation: Rows) -> Iterator[Problem]:
    """Find labels that are no numbers, or not as many as those of other rows."""
    wrong = [
        Problem(
            *rows.location(row),
            f"the label {short(label)} is no finite number, and model.task=regression learns"
            " numbers; correct it, or take the row out",
        )
        for rows in (train, evaluation)
        for row, label in enumerate(rows.labels)
        if not _are_numbers(label)
    ]
    yield from wrong or _find_lengths(train, evaluation)


def _are_numbers(label: Label) -> bool:
    several: Any = label if isinstance(label, tuple) else (label,)
    try:
        return not isinstance(label, Tags) and all(math.isfinite(float(one)) for one in several)
    except (ValueError, OverflowError):
        return False


def _find_repeated(train: Rows, evaluation: Rows) -> Iterator[Problem]:
    for rows in (train, evaluation):
        for row, label in enumerate(rows.labels):
            classes = classes_of(label)
            if len(set(classes)) < len(classes):
                yield Problem(
                    *rows.location(row), f"the label names a class twice: {short(list(classes))}"
                )


def _find_lengths(train: Rows, evaluation: Rows) -> Iterator[Problem]:
    expected: tuple[int, str] | None = None
    for rows in (train, evaluation):
        for row, label in enumerate(rows.labels):
            length = len(label) if isinstance(label, tuple) else 1
            if expected is None:
                expected = length, format_location(*rows.location(row))
            if length != expected[0] or not length:
                yield Problem(
                    *rows.location(row),
                    f"the label has {length} numbers, and that of {expected[1]} has {expected[0]}",
                )


def find_unknown_labels(rows: Rows, labels: Labels) -> Iterator[Problem]:
    """Find rows of an evaluation whose label is none that the model tells.

    Args:
        labels: Of the model; none of a language model.
    """
    if not len(rows):
        return
    if bool(rows.labels) != (labels.kind is not None):
        said = "a label, and the model writes text" if rows.labels else "no label"
        yield Problem(*rows.location(0), f"the row has {said}; take rows of the model's task")
        return
    for row, label in enumerate(rows.labels):
        reason = _find_numbers_problem if labels.kind is LabelKind.value else _find_class_problem
        if (problem := reason(label, labels)) is not None:
            yield Problem(*rows.location(row), problem)


def _find_numbers_problem(label: Label, labels: Labels) -> str | None:
    numbers: Any = label if isinstance(label, tuple) else (label,)
    told = len(labels.names)
    try:
        count = len([float(number) for number in numbers])
    except ValueError:
        return f"the label {short(label)} is no number, and the model tells numbers"
    return None if count == told else f"the label has {count} numbers, and the model tells {told}"


def _find_class_problem(label: Label, labels: Labels) -> str | None:
    if isinstance(label, Tags) != (labels.kind is LabelKind.tags):
        told = "tags of words" if labels.kind is LabelKind.tags else "classes of whole rows"
        return f"the label is {short(label)}, and the model tells {told}"
    if isinstance(label, tuple) and labels.kind is LabelKind.name:
        return f"the label is the list {short(label)}, and the model tells one class a row"
    new = [name for name in classes_of(label) if str(name) not in labels.numbers]
    if not new:
        return None
    known = ", ".join(labels.names[:8]) + (" ..." if len(labels.names) > 8 else "")
    return f"the model knows no class {short(new[0])}, only {known}; correct it or take it out"


def find_unlabeled(stores: Sequence[TokenStore]) -> list[Problem]:
    """Find sources whose rows have no labels beside others whose rows have some."""
    labeled = [store for store in stores if store.labels]
    if not labeled:
        return []
    example = format_location(*labeled[0].location(0))
    return [
        Problem(*store.location(0), f"the rows have no label, and those of {example} have one")
        for store in stores
        if len(store) and not store.labels
    ]


def find_mixed_labels(stores: Sequence[TokenStore]) -> list[Problem]:
    """Find labels of two kinds, such as text in some rows and numbers in others."""
    seen: dict[str, tuple[str, int, Any]] = {}
    rows_of: Counter[str] = Counter()
    for store in stores:
        for row, label in enumerate(store.labels):
            kind = _describe(label)
            if kind is None:
                continue
            rows_of[kind] += 1
            if kind not in seen:
                seen[kind] = (*store.location(row), label)
    if len(seen) < 2:
        return []
    (first, (file, line, label)), (second, (other, at, another)) = list(seen.items())[:2]
    return [
        Problem(
            other,
            at,
            f"mixed label types: {another!r} is {second} ({rows_of[second]:,} rows), but {label!r}"
            f" in {file}:{line} is {first} ({rows_of[first]:,} rows)",
        )
    ]


def _describe(label: Label) -> str | None:
    """Describe the kind of a label; None of an empty list, which goes with both kinds of lists."""
    if not isinstance(label, tuple):
        return "text" if isinstance(label, str) else "a number"
    if not label:
        return None
    items = "text" if isinstance(label[0], str) else "numbers"
    return f"a list of {items}" if not isinstance(label, Tags) else f"tags, of {items}"


def keep_every_class(
    train: np.ndarray[Any, Any], drawn: np.ndarray[Any, Any], labels: Sequence[Label]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Give back rows that were drawn for evaluation and are the only ones of their class.

    Args:
        train: Numbers of the rows for training, in order. Shape (rows,).
        drawn: Those of the rows for evaluation. Shape (rows,).
        labels: The label of every row.

    Returns:
        ``train`` and ``drawn``, some rows moved.
    """
    known = {name for row in train.tolist() for name in classes_of(labels[row])}
    back: list[int] = []
    for row in drawn.tolist():
        classes = classes_of(labels[row])
        if not known.issuperset(classes) and not any(isinstance(name, float) for name in classes):
            known.update(classes)
            back.append(row)
    moved = np.isin(drawn, back)
    return np.sort(np.concatenate([train, drawn[moved]])), drawn[~moved]
