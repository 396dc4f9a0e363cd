"""The rows of a run: how many there are, and where they are kept.

:mod:`llmtune.data.prepare` makes them; the run folder, the ranks and the model card refer to them.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSummary:
    """Counts of one split."""

    #: Field -> its name in files, which earlier versions wrote and other programs read
    #: (:func:`llmtune.storage.plain_fields.from_plain`).
    STORED_NAMES: ClassVar = {"supervised_tokens": "trained_tokens", "duplicates_of_eval": "twins"}

    rows: int
    """Rows as the model sees them: packed rows where packing is on."""
    documents: int
    """Rows of the sources, repeats counted."""
    tokens: int
    supervised_tokens: int
    """Tokens with a label."""
    dropped: int
    """Rows left out as over-long."""
    truncated: int
    skipped: int
    """Rows left out because they cannot be trained on.

    In evaluation files also those that are trained on.
    """
    duplicates_of_eval: int = 0
    """Training rows left out because they equal an evaluation row that was split off."""
    packing_efficiency: float | None = None
    """Share of the packed rows' positions that hold a token; None without packing."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, under the names that files hold."""
        return {self.STORED_NAMES.get(key, key): value for key, value in asdict(self).items()}


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
    """Classes of rows with labels, sorted."""
    fatal: int
    """Problems for which training is refused."""
    left_out: int
    """Problems of rows that were left out instead."""
    class_counts: list[int] = field(default_factory=list)
    """Training rows, or words, of each class."""
    label_kind: str | None = None
    """Kind of the labels (:class:`llmtune.task.labels.LabelKind`); None where rows have none."""
    outputs: int = 0
    """Classes, or values per row."""
    unknown_fields: list[str] = field(default_factory=list)
    """Fields of rows, messages and parts that are neither read nor known to be harmless, sorted."""
    formats: list[str] = field(default_factory=list)
    """Formats of the files, sorted."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, under the names that files hold."""
        splits = {
            "train": self.train.to_dict(),
            "eval": self.eval.to_dict() if self.eval else None,
        }
        return {**asdict(self), **splits}
