"""The rows of a run: how many there are, and where they are kept.

:mod:`llmtune.data.prepare` makes them; the run folder, the ranks and the model card refer to them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSummary:
    """Counts of one split."""

    rows: int
    """As the model sees them: packed rows where packing is on."""
    documents: int
    """Rows of the sources, repeats counted."""
    tokens: int
    trained_tokens: int
    dropped: int
    """Rows left out as over-long."""
    truncated: int
    skipped: int
    """Rows left out because they cannot be trained on, or, of evaluation files, because they are
    trained on.
    """
    twins: int = 0
    """Training rows left out because they equal one that was held out."""
    packing_efficiency: float | None = None
    """Share of the packed rows' places that hold a token; None without packing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedData:
    """Where the tokenized rows are, and what they are."""

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
    """Labels of classification rows, sorted; at most ``llmtune.data.prepare.MAX_CLASSES``."""
    fatal: int
    """Problems for which training is refused."""
    left_out: int
    """Problems of rows that were left out instead."""
    unknown_fields: list[str] = field(default_factory=list)
    """Fields of rows, messages and parts that are neither read nor known to be harmless, sorted."""
    formats: list[str] = field(default_factory=list)
    """As what the files were read, sorted."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PreparedData:
        """From plain values."""
        held_out = values["eval"]
        splits = {
            "train": SplitSummary(**values["train"]),
            "eval": SplitSummary(**held_out) if held_out else None,
        }
        return cls(**{**values, **splits})
