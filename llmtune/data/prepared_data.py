"""Open prepared data: its rows, prompts and problems, from the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtune.data.rows.problems import Problem, read_problem_file
from llmtune.data.store.token_store import Rows, TokenStore
from llmtune.plan.prepared_data import PreparedData

#: Files of a folder of prepared data.
SUMMARY, SAMPLES, PROBLEMS = "summary.json", "samples.json", "problems.jsonl"


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """An evaluation prompt with the answer that the data gives."""

    messages: list[dict[str, Any]]
    expected: str
    text: str
    """The messages as the model reads them, with the row's tools, up to where it answers."""


def open_rows(data: PreparedData, split: str) -> Rows:
    """Open the rows of ``train`` or ``eval``, mapped into memory."""
    stores = data.train_stores if split == "train" else data.eval_stores
    return open_index(Path(data.folder), stores, split)


def read_samples(data: PreparedData) -> list[SamplePrompt]:
    """Read the evaluation prompts, at most three; none without an evaluation split."""
    return [
        SamplePrompt(**sample) for sample in json.loads((Path(data.folder) / SAMPLES).read_text())
    ]


def read_problems(data: PreparedData) -> Iterator[Problem]:
    """Read the problems of the data: the ``fatal`` ones, then those of rows that were left out."""
    return read_problem_file(Path(data.folder) / PROBLEMS)


def open_index(folder: Path, stores: list[str], split: str) -> Rows:
    """Open the rows of a split by the folders of its index and of its token stores."""
    packs = folder / f"{split}_packs.npy"
    return Rows(
        [TokenStore(Path(store)) for store in stores],
        np.load(folder / f"{split}.npy", mmap_mode="r"),
        np.load(packs, mmap_mode="r") if packs.is_file() else None,
    )
