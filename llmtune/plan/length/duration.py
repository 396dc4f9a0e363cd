"""The time that a run takes, and its cost: the planned seconds of a step, times the steps."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llmtune.units import counted, format_seconds

#: What is told of a run whose steps are not known yet.
MILLION = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """The planned time of full rows, without loading, evaluations and checkpoints."""

    of: str
    """The work that takes it, such as ``100 steps of full rows``."""
    seconds: float
    rank_hours: float
    """Hours of all accelerators together."""
    cost: float | None
    """In the currency of ``hardware.gpu_hour_price``; None without it."""

    def describe(self, accelerator: str) -> str:
        """Describe time and cost.

        Args:
            accelerator: ``cuda`` or ``cpu``.
        """
        text = f"{self.of}: {format_seconds(self.seconds)}"
        if accelerator == "cuda":
            text += f", {self.rank_hours:.3g} GPU-hours"
        if self.cost is not None:
            text += f", which cost {self.cost:,.2f} at hardware.gpu_hour_price"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def predict_duration(
    tokens_per_second: float,
    ranks: int,
    hour_price: float | None,
    steps: int | None = None,
    step_tokens: float = 0.0,
) -> Duration:
    """Predict how long a run takes; without its steps, a million tokens.

    Args:
        tokens_per_second: Over all ranks, for full rows.
        ranks: One on each accelerator.
        hour_price: ``hardware.gpu_hour_price``.
        steps: Optimizer steps of the run.
        step_tokens: Tokens of a step of full rows; their mean, where steps grow.
    """
    of, tokens = "a million tokens in full rows", float(MILLION)
    if steps is not None:
        of, tokens = f"{counted(steps, 'step')} of full rows", steps * step_tokens
    seconds = tokens / tokens_per_second
    hours = ranks * seconds / 3600
    cost = hours * hour_price if hour_price is not None else None
    return Duration(of=of, seconds=seconds, rank_hours=hours, cost=cost)
