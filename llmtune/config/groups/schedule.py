"""The keys of ``schedule``: the learning rate over the steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ScheduleConfig:
    """Learning rate over the steps."""

    lr_scheduler_type: str = "cosine"
    """``cosine`` and ``linear`` fall to 0 at the last step; ``constant`` stays."""
    warmup_ratio: float = 0.05
    """Share of all steps over which the rate rises linearly."""
    warmup_steps: int | None = None
    """Warm-up in optimizer steps, instead of the ratio."""
