"""What a line of ``metrics.jsonl`` sums up where ``train.logging_steps`` is above 1; a checkpoint
carries it along.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LineSums:
    """Over the steps since the last line."""

    steps: int = 0
    loss: float = 0.0
    """Sum over all trained tokens, of the steps whose loss is finite."""
    trained_tokens: int = 0
    """Of those steps, over all ranks."""
    skipped_steps: tuple[int, ...] = ()
    """Steps that changed nothing."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> LineSums:
        """From plain values; None is the beginning of a line."""
        return (
            cls()
            if values is None
            else cls(**{**values, "skipped_steps": tuple(values["skipped_steps"])})
        )

    def add(self, step: int, loss: float, trained_tokens: int, applied: bool) -> LineSums:
        """With one step more.

        Args:
            loss: Mean over its trained tokens.
        """
        counts = math.isfinite(loss)
        return LineSums(
            steps=self.steps + 1,
            loss=self.loss + (loss * trained_tokens if counts else 0.0),
            trained_tokens=self.trained_tokens + (trained_tokens if counts else 0),
            skipped_steps=self.skipped_steps if applied else (*self.skipped_steps, step),
        )

    def to_record(self, loss: float) -> dict[str, Any]:
        """``loss``, the mean over all trained tokens since the last line, and which steps were
        skipped.

        Args:
            loss: Of the last step; where it is the only one it stands as it is, in every digit.
        """
        if self.steps == 1:
            return {"loss": loss, **({"skipped": True} if self.skipped_steps else {})}
        record: dict[str, Any] = {
            "loss": self.loss / self.trained_tokens if self.trained_tokens else float("nan")
        }
        if self.skipped_steps:
            record |= {"skipped": True, "skipped_steps": list(self.skipped_steps)}
        return record
