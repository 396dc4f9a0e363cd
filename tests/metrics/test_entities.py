"""Entities are seqeval's, and their scores too."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval import metrics as seqeval_metrics
from seqeval.metrics.sequence_labeling import get_entities

from llmtune.metrics.entities import count_entities, entity_metrics, find_entities

TYPES = ["PER", "LOC", "first-name", "组织", "-x"]
#: With types, bare prefixes, and a prefix whose type is empty.
TAGS = ["O", *(f"{prefix}-{name}" for prefix in "BIES" for name in TYPES), *"BIES", "B-", "I-"]
PAIRS = st.lists(
    st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), max_size=12),
    min_size=1,
    max_size=6,
)


def split(pairs: list[list[tuple[str, str]]]) -> tuple[list[list[str]], list[list[str]]]:
    return [[left for left, _ in row] for row in pairs], [
        [right for _, right in row] for row in pairs
    ]


@given(pairs=PAIRS)
@settings(max_examples=500, deadline=None)
def test_entities_and_scores_equal_those_of_seqeval(pairs: list[list[tuple[str, str]]]) -> None:
    predicted, true = split(pairs)
    for row in (*predicted, *true):
        assert find_entities(row) == get_entities(row)
    metrics = entity_metrics(predicted, true)
    if not any(pairs):
        assert metrics == {}
        return
    with warnings.catch_warnings():
        # No entity at all: the scores are 0.
        warnings.simplefilter("ignore")
        assert metrics == pytest.approx(
            {
                "eval_accuracy": seqeval_metrics.accuracy_score(true, predicted),
                "eval_f1": seqeval_metrics.f1_score(true, predicted),
                "eval_precision": seqeval_metrics.precision_score(true, predicted),
                "eval_recall": seqeval_metrics.recall_score(true, predicted),
            },
            abs=1e-12,
        )


@given(pairs=PAIRS)
@settings(max_examples=200, deadline=None)
def test_the_scores_of_each_type_equal_those_of_seqeval(pairs: list[list[tuple[str, str]]]) -> None:
    predicted, true = split(pairs)
    names, counts = count_entities(predicted, true)
    if not names:
        return
    report = seqeval_metrics.classification_report(
        true, predicted, output_dict=True, zero_division=0
    )
    rows = zip(counts.precision(), counts.recall(), counts.f1(), counts.true, strict=True)
    for name, scores in zip(names, rows, strict=True):
        expected = report[name]
        fields = ("precision", "recall", "f1-score", "support")
        assert scores == pytest.approx([expected[field] for field in fields]), name


@pytest.mark.parametrize(
    ("tags", "entities"),
    [
        (["B-PER", "I-PER", "O", "B-LOC"], [("PER", 0, 1), ("LOC", 3, 3)]),
        # I without B, after nothing, another type, and an end.
        (["I-PER", "I-PER", "O"], [("PER", 0, 1)]),
        (["B-PER", "I-LOC"], [("PER", 0, 0), ("LOC", 1, 1)]),
        (["B-PER", "E-PER", "I-PER"], [("PER", 0, 1), ("PER", 2, 2)]),
        (["B-PER", "B-PER"], [("PER", 0, 0), ("PER", 1, 1)]),
        (["S-PER", "S-PER"], [("PER", 0, 0), ("PER", 1, 1)]),
        # BILOU and BMES.
        (
            ["B-PER", "I-PER", "L-PER", "U-PER", "B-PER"],
            [("PER", 0, 2), ("PER", 3, 3), ("PER", 4, 4)],
        ),
        (["B-NAME", "M-NAME", "E-NAME", "S-NAME"], [("NAME", 0, 2), ("NAME", 3, 3)]),
        # Names without prefix, of which seqeval would take the first letter for one.
        (["PER", "PER", "ORG", "O", "ORG"], [("PER", 0, 1), ("ORG", 2, 2), ("ORG", 4, 4)]),
        (
            ["NOUN", "NOUN", "PRON-X", "M", "L"],
            [("NOUN", 0, 1), ("PRON-X", 2, 2), ("M", 3, 3), ("L", 4, 4)],
        ),
        (["O", "O"], []),
        ([], []),
    ],
)
def test_runs_of_tags_are_entities(tags: list[str], entities: list[tuple[str, int, int]]) -> None:
    assert find_entities(tags) == entities


def test_an_entity_ends_with_its_row() -> None:
    metrics = entity_metrics([["B-A"], ["I-A"]], [["B-A"], ["O"]])
    assert metrics["eval_precision"] == 0.5
    assert metrics["eval_recall"] == 1.0
    assert metrics["eval_accuracy"] == 0.5


def test_rows_without_entities_have_scores_of_zero_and_an_accuracy() -> None:
    assert entity_metrics([["O", "O"]], [["O", "O"]]) == {
        "eval_accuracy": 1.0,
        "eval_f1": 0.0,
        "eval_precision": 0.0,
        "eval_recall": 0.0,
    }
    assert entity_metrics([], []) == {}
    assert entity_metrics([[]], [[]]) == {}


@pytest.mark.parametrize(
    ("predicted", "true"), [([["O"]], [["O", "O"]]), ([["O"], ["O"]], [["O"]])]
)
def test_rows_of_different_lengths_are_refused(
    predicted: list[list[str]], true: list[list[str]]
) -> None:
    with pytest.raises(ValueError, match="zip"):
        entity_metrics(predicted, true)
