"""Labels of rows: what is read, what is refused, and how they are numbered."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from llmtune.config.groups.data import DataConfig, Overlong
from llmtune.data.label_kind import peek_label_kind
from llmtune.data.prepare import prepare_data
from llmtune.data.prepared_data import open_rows
from llmtune.data.report.label_checks import keep_every_class, sort_classes
from llmtune.errors import ConfigError, DataError
from llmtune.plan.prepared_data import PreparedData
from llmtune.task.labels import LabelKind, Labels, Tags, label_from_json, label_to_json


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def prepare(file: Path, tokenizer: Any, folder: Path, **settings: Any) -> PreparedData:
    given = {"val_set_size": 0, "num_workers": 0, "max_seq_length": 64, **settings}
    config = DataConfig(train=str(file), **given)
    return prepare_data(config, tokenizer, 1, folder / "cache")


KINDS: dict[str, tuple[list[Any], LabelKind, list[Any]]] = {
    "names": (["pos", "neg", "pos"], LabelKind.name, ["neg", "pos"]),
    "integers": ([10, 2, 2], LabelKind.name, [2, 10]),
    "integers_as_text": (["10", "2", "-1"], LabelKind.name, ["-1", "2", "10"]),
    "several": ([["b"], [], ["c", "b"]], LabelKind.names, ["b", "c"]),
    "numbers": ([1.5, 2, -0.25], LabelKind.value, []),
    "several_numbers": ([[1, 2], [0.5, 1], [0, 0]], LabelKind.value, []),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_kind_and_the_classes_of_labels_are_found(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    labels, kind, classes = KINDS[name]
    file = write(tmp_path, [{"text": f"t{n}", "label": one} for n, one in enumerate(labels)])
    data = prepare(file, tokenizer, tmp_path)
    assert (data.label_kind, data.classes) == (kind.value, classes)
    assert peek_label_kind(DataConfig(train=str(file))) is kind
    counted = [
        sum(1 for one in labels for c in np.atleast_1d(one).tolist() if str(c) == str(k))
        for k in classes
    ]
    assert data.class_counts == counted


@pytest.mark.parametrize(
    "labels", [["3.8", "2", "2.5"], ["-.5", "1e-3"], ["1.0", "2.0"]], ids=" ".join
)
def test_numbers_that_are_written_as_text_are_not_guessed_at(
    labels: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"a,{label}\n" for label in labels))
    with pytest.raises(ConfigError, match=r"written as text.*regression.*sequence_classification"):
        peek_label_kind(DataConfig(train=str(file)))


@pytest.mark.parametrize("labels", [["3", "2"], ["3.8", "x"], ["v1.0", "v2.0"]], ids=" ".join)
def test_names_that_are_not_all_numbers_are_classes(labels: list[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"a,{label}\n" for label in labels))
    assert peek_label_kind(DataConfig(train=str(file))) is LabelKind.name


def test_words_keep_their_tags_also_where_a_row_is_cut(tokenizer: Any, tmp_path: Path) -> None:
    random.seed(0)
    words = [
        [random.choice(["str", "dictionary", "unbelievable"]) for _ in range(n)] for n in (3, 9, 30)
    ]
    rows = [{"tokens": w, "tags": [f"{word[0]}{n % 2}" for n, word in enumerate(w)]} for w in words]
    file = write(tmp_path, rows)
    data = prepare(
        file,
        tokenizer,
        tmp_path,
        max_seq_length=24,
        overlong=Overlong.truncate,
        max_overlong_share=1.0,
    )
    prepared = open_rows(data, "train")
    for number in range(len(prepared)):
        row = prepared.row(number)
        assert isinstance(row.label, Tags)
        original = next(
            r for r in rows if r["tags"][: len(row.label)] == list(row.label) and len(row.ids) <= 24
        )
        assert isinstance(row.label, Tags)
        assert int(row.mask.sum()) == len(row.label)
        starts = np.flatnonzero(row.mask).tolist()
        ends = [*starts[1:], len(row.ids)]
        texts = [tokenizer.decode(row.ids[a:b]).strip() for a, b in zip(starts, ends, strict=True)]
        assert texts[:-1] == original["tokens"][: len(texts) - 1]
    assert data.train.truncated >= 1


BAD: dict[str, tuple[list[Any], str]] = {
    "one_class": (["a", "a", "a"], r"rows.jsonl:1: every row has the class 'a'"),
    "mixed": (["a", 1, "b"], r"rows.jsonl:2: mixed label types: 1 is a number \(1 rows\)"),
    "a_list_among_names": (["a", ["b"], "c"], r"rows.jsonl:2: mixed label types"),
    "empty": (["a", "", "b"], r"rows.jsonl:2: the field 'label' is empty"),
    "blank": (["a", " ", "b"], r"rows.jsonl:2: the field 'label' has nothing but white space"),
    "truth": (["a", True, "b"], r"rows.jsonl:2: the field 'label' must be text, a number"),
    "a_mapping": (["a", {"x": 1}, "b"], r"rows.jsonl:2: the field 'label' must be text, a number"),
    "a_mixed_list": ([["a", 1], ["b"], ["c"]], r"rows.jsonl:1: the list 'label' holds text and"),
    "twice": ([["a", "a"], ["b"], ["c"]], r"rows.jsonl:1: the list 'label' names a class twice"),
    "lengths": ([[1.5, 2], [0.5], [1, 1]], r"rows.jsonl:2: the label has 1 numbers, and that of"),
}


@pytest.mark.parametrize("name", BAD)
def test_labels_that_cannot_be_learned_are_refused_with_their_line(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    labels, message = BAD[name]
    file = write(tmp_path, [{"text": f"t{n}", "label": one} for n, one in enumerate(labels)])
    with pytest.raises(DataError, match=message):
        prepare(file, tokenizer, tmp_path)


def test_a_class_that_is_evaluated_and_never_trained_is_refused(
    tokenizer: Any, tmp_path: Path
) -> None:
    train = write(tmp_path, [{"text": f"t{n}", "label": "ab"[n % 2]} for n in range(6)])
    held = [{"text": "x", "label": "a"}, {"text": "y", "label": "c"}]
    other = write(tmp_path, held, "eval.jsonl")
    with pytest.raises(DataError, match=r"eval.jsonl:2: the class 'c' is in no training row"):
        prepare(train, tokenizer, tmp_path, eval=str(other))
    write(tmp_path, held[:1], "eval.jsonl")
    assert prepare(train, tokenizer, tmp_path, eval=str(other)).eval is not None


def test_a_word_without_a_token_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "b"], "tags": ["x", "y"]}, {"tokens": ["a"], "tags": ["x", "y"]}]
    with pytest.raises(DataError, match=r"rows.jsonl:2: there are 1 'tokens' and 2 'tags'"):
        prepare(write(tmp_path, rows), tokenizer, tmp_path)


def test_the_only_row_of_a_class_is_trained_on_whatever_is_drawn() -> None:
    random.seed(1)
    for _ in range(200):
        labels = [random.choice("abcde") for _ in range(random.randint(2, 30))]
        order = np.random.default_rng(random.randint(0, 99)).permutation(len(labels))
        cut = random.randint(1, len(labels))
        kept, drawn = keep_every_class(np.sort(order[:cut]), order[cut:], labels)
        assert sorted([*kept.tolist(), *drawn.tolist()]) == list(range(len(labels)))
        assert {labels[row] for row in kept} == set(labels)
        assert list(kept) == sorted(kept)
        # Nothing is given back without need.
        assert len(kept) - cut <= len(set(labels))


def test_classes_are_sorted_as_numbers_where_all_are() -> None:
    assert sort_classes({"10", "9", "-1"}) == ["-1", "9", "10"]
    assert sort_classes({"10", "9", "b"}) == ["10", "9", "b"]
    assert sort_classes({3, 20, 1}) == [1, 3, 20]


def test_labels_survive_json() -> None:
    for label in ("a", 3, 1.5, ("a", "b"), (), Tags(("O", "B"))):
        again = label_from_json(json.loads(json.dumps(label_to_json(label))))
        assert (again, type(again)) == (label, type(label))
    labels = Labels(kind=LabelKind.names, names=("a", "b"), weights=(1.0, 2.0))
    assert Labels.from_dict(json.loads(json.dumps(labels.to_dict()))) == labels
    assert Labels.from_dict({}) == Labels()


def test_labels_become_numbers() -> None:
    names = ("a", "b", "c")
    assert Labels(kind=LabelKind.name, names=names).encode("b") == 1
    assert Labels(kind=LabelKind.name, names=("0", "7")).encode(7) == 1
    assert Labels(kind=LabelKind.names, names=names).encode(("c", "a")) == [1.0, 0.0, 1.0]
    assert Labels(kind=LabelKind.names, names=names).encode(()) == [0.0, 0.0, 0.0]
    assert Labels(kind=LabelKind.tags, names=names).encode(Tags(("c", "a"))) == [2, 0]
    assert Labels(kind=LabelKind.value, names=("v",)).encode(2) == [2.0]
    assert Labels(kind=LabelKind.value, names=("v", "w")).encode((2, 0.5)) == [2.0, 0.5]


def prepare_numbers(file: Path, tokenizer: Any, folder: Path, **settings: Any) -> PreparedData:
    given = {"val_set_size": 0, "num_workers": 0, "max_seq_length": 64, **settings}
    config = DataConfig(train=str(file), **given)
    return prepare_data(config, tokenizer, 1, folder / "cache", learns_numbers=True)


NUMBERS: dict[str, tuple[list[Any], int]] = {
    "integers": ([3, 1, 2], 1),
    "as_text": (["3", "1.5", "-2e3"], 1),
    "text_beside_numbers": ([3, "1", 2.5], 1),
    "lists_of_integers": ([[0, 0], [1, 2], [1, 1]], 2),
    "the_same_everywhere": ([7, 7, 7], 1),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_whole_numbers_are_values_where_numbers_are_learned(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    labels, outputs = NUMBERS[name]
    rows = [{"text": f"t{n}", "label": one} for n, one in enumerate(labels)]
    data = prepare_numbers(write(tmp_path, rows), tokenizer, tmp_path)
    assert (data.label_kind, data.outputs, data.classes) == ("value", outputs, [])


def test_numbers_are_held_out_that_no_training_row_has(tokenizer: Any, tmp_path: Path) -> None:
    """1,500 prices, each of them once: they are no classes."""
    rows = [{"text": f"t{n}", "label": 1000 + 7 * n} for n in range(1500)]
    file = write(tmp_path, rows)
    data = prepare_numbers(file, tokenizer, tmp_path, val_set_size=0.1)
    assert data.eval is not None
    assert (data.train.rows, data.eval.rows) == (1350, 150)
    other = write(tmp_path, [{"text": "x", "label": 3}], "eval.jsonl")
    assert prepare_numbers(file, tokenizer, tmp_path, eval=str(other)).eval is not None
    with pytest.raises(DataError, match="1,500 classes, more than 1,000"):
        prepare(file, tokenizer, tmp_path)


@pytest.mark.parametrize("wrong", ["NaN", "inf", "five", [], [1, 2]])
def test_labels_that_are_no_numbers_are_refused_where_numbers_are_learned(
    wrong: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"text": f"t{n}", "label": one} for n, one in enumerate([1, 2, wrong, 4])]
    with pytest.raises(DataError, match=r"rows.jsonl:3: the label"):
        prepare_numbers(write(tmp_path, rows), tokenizer, tmp_path)


def test_names_stay_classes_where_numbers_are_learned(tokenizer: Any, tmp_path: Path) -> None:
    """The error is of the task then, not of one row."""
    rows = [{"text": f"t{n}", "label": "ab"[n % 2]} for n in range(4)]
    data = prepare_numbers(write(tmp_path, rows), tokenizer, tmp_path)
    assert (data.label_kind, data.classes) == ("class", ["a", "b"])


def test_a_number_with_a_fraction_is_none_of_the_trained_classes(
    tokenizer: Any, tmp_path: Path
) -> None:
    """Python says that 1.0 equals 1; as the name of a class it does not."""
    train = write(tmp_path, [{"text": f"t{n}", "label": n % 2} for n in range(6)])
    other = write(tmp_path, [{"text": "x", "label": 1.0}], "eval.jsonl")
    with pytest.raises(DataError, match=r"eval.jsonl:1: the class 1.0 is in no training row"):
        prepare(train, tokenizer, tmp_path, eval=str(other))
