"""Metrics of tagged tokens: of the tokens, and of the entities that their tags make up.

Entities are those of conlleval.pl, and of seqeval with ``mode=None``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from llmtune.metrics.counts import Counts, divide

#: The tag of a token that is in no entity.
OUTSIDE = "O"
#: What begins, continues, ends or is a whole entity (IOB and IOBES), and other letters for the last
#: three (BILOU, BMES).
_PREFIXES = {letter: letter for letter in "BIES"} | {"M": "I", "L": "E", "U": "S"}
#: The type of an entity whose tags are a prefix alone.
_NO_TYPE = "_"


class Entity(NamedTuple):
    """An entity of a row."""

    type: str
    first: int
    """Index of its first token."""
    last: int
    """Index of its last token."""


class _Tag(NamedTuple):
    prefix: str
    type: str


def entity_metrics(
    predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return the scores of the entities and the accuracy of the tags; empty without tags.

    An entity is right where type, first and last token are. The sums are over all types (micro), as
    seqeval has it; each value is 0 where its denominator is.

    Args:
        predicted: The names of the tags of each row's words.
        true: The same shape.

    Raises:
        ValueError: A row has more tags in one than in the other.
    """
    pairs = [
        pair
        for row, true_row in zip(predicted, true, strict=True)
        for pair in zip(row, true_row, strict=True)
    ]
    if not pairs:
        return {}
    _, counts = count_entities(predicted, true)
    total = counts.total()
    return {
        "eval_accuracy": divide(sum(tag == true_tag for tag, true_tag in pairs), len(pairs)),
        "eval_f1": total.f1()[0],
        "eval_precision": total.precision()[0],
        "eval_recall": total.recall()[0],
    }


def count_entities(
    predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], Counts]:
    """Count the entities by type.

    Returns:
        The types that are in either, sorted, and the counts of each.
    """
    right: Counter[str] = Counter()
    in_predicted: Counter[str] = Counter()
    in_true: Counter[str] = Counter()
    for row, true_row in zip(predicted, true, strict=True):
        entities, true_entities = find_entities(row), find_entities(true_row)
        right.update(entity.type for entity in set(entities) & set(true_entities))
        in_predicted.update(entity.type for entity in entities)
        in_true.update(entity.type for entity in true_entities)
    types = tuple(sorted(in_predicted | in_true))
    counts = Counts(
        correct=tuple(right[name] for name in types),
        predicted=tuple(in_predicted[name] for name in types),
        true=tuple(in_true[name] for name in types),
    )
    return types, counts


def find_entities(tags: Sequence[str]) -> list[Entity]:
    """Find the entities of one row: the longest runs in which each tag continues the one before.

    An ``I-`` or ``E-`` that continues nothing begins an entity. A name without prefix is a type:
    a run of the same name is one entity.
    """
    entities: list[Entity] = []
    before = _Tag(OUTSIDE, _NO_TYPE)
    for index, tag in enumerate(map(_parse_tag, tags)):
        if _continues(tag, before):
            entities[-1] = entities[-1]._replace(last=index)
        elif tag.prefix != OUTSIDE:
            entities.append(Entity(tag.type, index, index))
        before = tag
    return entities


def _parse_tag(tag: str) -> _Tag:
    letter, dash, name = tag.partition("-")
    if tag == OUTSIDE:
        return _Tag(OUTSIDE, _NO_TYPE)
    if letter in _PREFIXES and (dash or letter in "BIES"):
        return _Tag(_PREFIXES[letter], name or _NO_TYPE)
    return _Tag("I", tag)


def _continues(tag: _Tag, before: _Tag) -> bool:
    return before.prefix in ("B", "I") and tag.prefix in ("I", "E") and tag.type == before.type
