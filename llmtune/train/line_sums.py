"""The sums of a line of ``metrics.jsonl`` where ``train.logging_steps`` is above 1.

Checkpoints store them, so that a resumed run writes the same lines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LineSums:
    """Sums over the steps since the last line."""

    steps: int = 0
    loss: float = 0.0
    """Sum over the targets of the steps whose loss is finite."""
    trained_tokens: float = 0
    """Trained tokens of those steps, or the weight of their rows, over all ranks."""
    skipped_steps: tuple[int, ...] = ()
    """Steps that changed nothing."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> LineSums:
        """Build the sums from what JSON made of them; None is the beginning of a line."""
        if values is None:
            return cls()
        return cls(**{**values, "skipped_steps": tuple(values["skipped_steps"])})

    def add(self, step: int, loss: float, weight: float, applied: bool) -> LineSums:
        """Return the sums with one more step.

        Args:
            loss: Mean over the step's targets.
            weight: Of those targets.
        """
        counts = math.isfinite(loss)
        return LineSums(
            steps=self.steps + 1,
            loss=self.loss + (loss * weight if counts else 0.0),
            trained_tokens=self.trained_tokens + (weight if counts else 0),
            skipped_steps=self.skipped_steps if applied else (*self.skipped_steps, step),
        )

    def to_record(self, loss: float) -> dict[str, Any]:
        """Return ``loss``, the mean over all trained tokens since the last line, and skipped steps.

        Args:
            loss: Loss of the last step; it is recorded to the last digit if it is the only one.
        """
        record: dict[str, Any] = {"loss": loss}
        if self.steps == 1:
            return {**record, "skipped": True} if self.skipped_steps else record
        record["loss"] = self.loss / self.trained_tokens if self.trained_tokens else float("nan")
        if self.skipped_steps:
            record |= {"skipped": True, "skipped_steps": list(self.skipped_steps)}
        return record
