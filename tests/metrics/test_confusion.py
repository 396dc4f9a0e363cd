"""The table of an evaluation agrees with its metrics and scikit-learn, and can be read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from sklearn import metrics as sklearn_metrics

from llmtune.export.markdown import escape
from llmtune.metrics.classification import classification_metrics
from llmtune.metrics.confusion import ConfusionTable, ScoreRow, TableKind
from llmtune.metrics.entities import entity_metrics
from llmtune.metrics.multilabel import multilabel_metrics
from llmtune.metrics.report import format_scores, read_confusion, write_confusion
from llmtune.storage import layout
from tests.metrics.predictions import Draws, draws

TRUE_TAGS = [["B-PER", "I-PER", "O", "B-LOC"], ["B-ORG", "O"]]
PREDICTED_TAGS = [["B-PER", "I-PER", "O", "B-ORG"], ["B-ORG", "O"]]


def scores(row: ScoreRow) -> list[float]:
    return [row.precision, row.recall, row.f1, row.support]


def expected(report: dict[str, dict[str, float]], name: str) -> list[float]:
    return [report[name][key] for key in ("precision", "recall", "f1-score", "support")]


@given(drawn=draws())
@settings(max_examples=100, deadline=None)
def test_a_table_of_classes_has_the_scores_of_scikit_learn(drawn: Draws) -> None:
    logits, labels = drawn.scores(), drawn.labels()
    names = [f"class {index}" for index in range(drawn.columns)]
    table = ConfusionTable.of_classes(logits, labels, names)
    predicted = logits.argmax(dim=1)
    classes = range(drawn.columns)
    matrix = sklearn_metrics.confusion_matrix(labels, predicted, labels=classes)
    assert [list(row) for row in table.counts] == matrix.tolist()
    report = sklearn_metrics.classification_report(
        labels,
        predicted,
        labels=classes,
        target_names=names,
        output_dict=True,
        zero_division=0,
    )
    for row in table.scores:
        assert scores(row) == pytest.approx(expected(report, row.name))
    macro, micro, weighted = table.averages
    metrics = classification_metrics(logits, labels)
    assert scores(weighted) == pytest.approx(expected(report, "weighted avg"))
    assert [macro.precision, macro.recall, macro.f1] == [
        metrics[f"eval_{key}"] for key in ("precision", "recall", "f1")
    ]
    assert micro.f1 == metrics["eval_f1_micro"]
    assert ConfusionTable.from_json(table.to_json()) == table


@given(drawn=draws(min_columns=1))
@settings(max_examples=100, deadline=None)
def test_a_table_of_labels_has_the_scores_of_scikit_learn(drawn: Draws) -> None:
    logits, targets = drawn.scores(), drawn.sets()
    names = [f"label {index}" for index in range(drawn.columns)]
    table = ConfusionTable.of_labels(logits, targets, names)
    metrics = multilabel_metrics(logits, targets)
    macro, micro, _ = table.averages
    assert (macro.f1, micro.f1) == (metrics["eval_f1"], metrics["eval_f1_micro"])
    assert ConfusionTable.from_json(table.to_json()) == table
    if drawn.columns > 1:
        predicted = (logits > 0).long()
        matrices = sklearn_metrics.multilabel_confusion_matrix(targets, predicted)
        assert json.loads(table.to_json())["counts"] == matrices.tolist()
        report = sklearn_metrics.classification_report(
            targets, predicted, target_names=names, output_dict=True, zero_division=0
        )
        for row in table.scores:
            assert scores(row) == pytest.approx(expected(report, row.name))
        for row in table.averages:
            assert scores(row) == pytest.approx(expected(report, f"{row.name} avg"))


def test_a_table_of_tags_has_a_row_per_type_of_entity() -> None:
    table = ConfusionTable.of_tags(PREDICTED_TAGS, TRUE_TAGS)
    assert table.names == ("LOC", "ORG", "PER")
    assert table.counts == ((0, 0, 1), (1, 2, 1), (1, 1, 1))
    metrics = entity_metrics(PREDICTED_TAGS, TRUE_TAGS)
    _, micro, _ = table.averages
    assert [micro.precision, micro.recall, micro.f1] == [
        metrics[f"eval_{key}"] for key in ("precision", "recall", "f1")
    ]
    assert ConfusionTable.from_json(table.to_json()) == table


def test_no_rows_make_a_table_of_zeros() -> None:
    nothing = torch.empty(0, 2)
    classes = ConfusionTable.of_classes(nothing, torch.empty(0, dtype=torch.long), "ab")
    assert classes.counts == ((0, 0), (0, 0))
    assert ConfusionTable.of_labels(nothing, nothing, "ab").counts == (((0, 0), (0, 0)),) * 2
    assert ConfusionTable.of_tags([], []).counts == ()
    assert {row.f1 for row in classes.averages} == {0.0}


def test_the_file_is_read_by_people_and_read_again(tmp_path: Path) -> None:
    names = ("体育", "a\nb", "\ud800")
    table = ConfusionTable.of_classes(torch.eye(3)[[0, 1, 1]], torch.tensor([0, 1, 2]), names)
    write_confusion(table, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        layout.CONFUSION_TABLE,
        layout.CONFUSION_PLOT,
    ]
    text = (tmp_path / layout.CONFUSION_TABLE).read_text()
    assert "\n  [0, 1, 0],\n  [0, 1, 0]\n" in text
    assert "体育" in text
    fields = json.loads(text)
    assert fields["per_class"][1] == {
        "name": "a\nb",
        "precision": 0.5,
        "recall": 1.0,
        "f1": pytest.approx(2 / 3),
        "support": 1,
    }
    assert [row["name"] for row in fields["averages"]] == ["macro", "micro", "weighted"]
    assert read_confusion(tmp_path) == table


GOOD = {"version": 1, "kind": "classes", "names": ["a", "b"], "counts": [[1, 0], [0, 1]]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        *(
            json.dumps(GOOD | change)
            for change in (
                {"version": 2},
                {"kind": "colors"},
                {"kind": "labels"},
                {"names": ["a"]},
                {"names": None},
                {"counts": [[1, 0]]},
                {"counts": [[1, 0], [0]]},
                {"counts": [[1, 0], [0, -1]]},
                {"counts": [[1, 0], [0, 1.0]]},
                {"counts": [[1, 0], [0, True]]},
                {"counts": [1, 2]},
                {"counts": 3},
            )
        ),
    ],
)
def test_what_is_no_table_is_not_read(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="."):
        ConfusionTable.from_json(text)
    assert read_confusion(tmp_path) is None
    (tmp_path / layout.CONFUSION_TABLE).write_text(text)
    assert read_confusion(tmp_path) is None


def test_what_is_a_table_is_read() -> None:
    assert ConfusionTable.from_json(json.dumps(GOOD)).sums.true == (1, 1)


def test_names_and_counts_must_belong_together() -> None:
    with pytest.raises(ValueError, match=r"another shape than \(3, 3\)"):
        ConfusionTable.of_classes(torch.eye(2), torch.tensor([0, 1]), ["a", "b", "c"])


def diagonal(supports: list[int]) -> ConfusionTable:
    counts = tuple(
        tuple(support if row == column else 0 for column in range(len(supports)))
        for row, support in enumerate(supports)
    )
    names = tuple(f"n{index}" for index in range(len(supports)))
    return ConfusionTable(kind=TableKind.CLASSES, names=names, counts=counts)


def test_the_scores_are_a_table_of_markdown() -> None:
    logits, labels = torch.eye(2)[[0, 1, 1, 1]], torch.tensor([0, 1, 1, 0])
    table = ConfusionTable.of_classes(logits, labels, ["a|b", "<x>"])
    assert format_scores(table, escape).splitlines() == [
        "| class | precision | recall | F1 | support |",
        "| --- | --- | --- | --- | --- |",
        r"| a\|b | 1.000 | 0.500 | 0.667 | 2 |",
        "| &lt;x&gt; | 0.667 | 1.000 | 0.800 | 2 |",
        "| *macro average* | 0.833 | 0.750 | 0.733 | 4 |",
        "| *micro average* | 0.750 | 0.750 | 0.750 | 4 |",
        "| *weighted average* | 0.833 | 0.750 | 0.733 | 4 |",
    ]


def test_of_many_classes_the_largest_are_shown_in_their_order() -> None:
    assert "largest" not in format_scores(diagonal([1] * 30), escape)
    text = format_scores(diagonal([5, 1, *([3] * 28), 9]), escape)
    shown = [line.split()[1] for line in text.splitlines() if line.startswith("| n")]
    assert shown == ["n0", *(f"n{index}" for index in range(2, 31))]
    assert text.endswith(
        "\n\nThe 30 of 31 with the largest support; all of them are in `confusion_matrix.json`.\n"
    )
