"""Prepared data as training sees it: counts, rows, prompts and problems, read from the cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmtune.data.rows.problems import Problem, read_problem_file
from llmtune.data.store.token_store import Rows, TokenStore

#: Files of a folder of prepared data.
SUMMARY, SAMPLES, PROBLEMS = "summary.json", "samples.json", "problems.jsonl"

#: Names of fields -> their names in files, which earlier versions wrote and other programs read.
_STORED_NAMES = {"supervised_tokens": "trained_tokens", "duplicates_of_eval": "twins"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSummary:
    """Counts of one split."""

    rows: int
    """As the model sees them: packed rows where packing is on."""
    documents: int
    """Rows of the sources, repeats counted."""
    tokens: int
    supervised_tokens: int
    """Tokens with a label."""
    dropped: int
    """Rows left out as over-long."""
    truncated: int
    skipped: int
    """Rows left out because they cannot be trained on, or, of evaluation files, because they are
    trained on.
    """
    duplicates_of_eval: int = 0
    """Training rows left out because they equal an evaluation row that was split off."""
    packing_efficiency: float | None = None
    """Share of the packed rows' positions that hold a token; None without packing."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SplitSummary:
        """Read the plain values of :meth:`to_dict`."""
        names = {stored: name for name, stored in _STORED_NAMES.items()}
        return cls(**{names.get(key, key): value for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, under the names that files hold."""
        return {_STORED_NAMES.get(key, key): value for key, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """The tokenized rows: where they are on disk, and what is known of them."""

    folder: str
    fingerprint: str
    """Hash of sources, template, tokenizer and settings."""
    train: SplitSummary
    eval: SplitSummary | None
    train_stores: list[str]
    eval_stores: list[str]
    special_tokens: list[int]
    """Special tokens that occur in the rows."""
    classes: list[str | int | float]
    """Labels of classification rows, sorted; at most ``MAX_CLASSES``."""
    fatal: int
    """Problems for which training is refused."""
    left_out: int
    """Problems of rows that were left out instead."""
    unknown_fields: list[str] = field(default_factory=list)
    """Fields of rows, messages and parts that are neither read nor known to be harmless, sorted."""
    formats: list[str] = field(default_factory=list)
    """Formats of the files, sorted."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PreparedData:
        """Read the plain values of :meth:`to_dict`."""
        splits = {
            split: SplitSummary.from_dict(values[split]) if values[split] else None
            for split in ("train", "eval")
        }
        return cls(**{**values, **splits})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, under the names that files hold."""
        splits = {
            "train": self.train.to_dict(),
            "eval": self.eval.to_dict() if self.eval else None,
        }
        return {**asdict(self), **splits}


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
