"""The labels of a run: what the settings say of them, and what the rows have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmtune.config.schema import Config
from llmtune.errors import ConfigError
from llmtune.run.task import prepare_rows, resolve_labels
from llmtune.task.labels import Labels


def resolve(labels: list[Any], task: str, weights: Any, model: Path, folder: Path) -> Labels:
    file = folder / "rows.jsonl"
    rows = [{"text": f"t{n}", "label": label} for n, label in enumerate(labels)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = Config()
    data = replace(
        config.data, train=str(file), val_set_size=0, num_workers=0, class_weights=weights
    )
    config = replace(config, data=data, model=replace(config.model, task=task))
    tokenizer = AutoTokenizer.from_pretrained(model)
    return resolve_labels(config, prepare_rows(config, tokenizer, folder / "cache"), model)


@pytest.mark.parametrize("weights", ["balanced", [1.0]])
def test_weights_of_classes_are_refused_where_rows_have_numbers(
    weights: Any, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="have no classes; take data.class_weights=none"):
        resolve([1, 2, 3], "regression", weights, tiny_model, tmp_path)


@pytest.mark.parametrize("weights", ["none", None])
def test_numbers_need_no_weights(weights: Any, tiny_model: Path, tmp_path: Path) -> None:
    assert resolve([1, 2, 3], "regression", weights, tiny_model, tmp_path).names == ("value",)


def test_whole_numbers_are_weighed_where_they_are_classes(tiny_model: Path, tmp_path: Path) -> None:
    labels = resolve([1, 2, 2], "sequence_classification", "balanced", tiny_model, tmp_path)
    assert (labels.names, labels.weights) == (("1", "2"), (1.5, 0.75))
