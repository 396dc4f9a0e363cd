"""The keys of ``schedule``: the learning rate over the steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the steps; names and meaning are those of transformers."""

    lr_scheduler_type: str = "cosine"
    """``cosine`` and ``linear`` fall to 0 at the last step; ``constant`` stays.

    ``cosine_with_min_lr`` falls to a rate above 0, ``cosine_with_restarts`` several times,
    ``polynomial`` to ``lr_end``. ``inverse_sqrt`` falls with the root of the step, whatever the
    length of the run. ``warmup_stable_decay`` (``schedule=wsd``) stays, and falls at the end.
    """
    warmup_ratio: float = 0.05
    """Share of all steps over which the rate rises linearly."""
    warmup_steps: int | None = None
    """Warm-up in optimizer steps, instead of the ratio."""
    min_lr: float | None = None
    """Learning rate at the end of ``cosine_with_min_lr``."""
    min_lr_rate: float | None = None
    """The same as a share of the peak; also for ``warmup_stable_decay``, where null is 0."""
    num_cycles: int = 1
    """Cosines of ``cosine_with_restarts``, one after the other."""
    lr_end: float = 1e-7
    """Learning rate at the end of ``polynomial``."""
    power: float = 1.0
    """Power of the share of steps to come, with ``polynomial``."""
    timescale: int | None = None
    """Steps in which ``inverse_sqrt`` falls to 0.71 of the peak, from the end of the warm-up on.

    Null takes the steps of the warm-up, or 10,000 without one.
    """
    decay_ratio: float = 0.1
    """Share of all steps in which ``warmup_stable_decay`` falls."""
    num_decay_steps: int | None = None
    """The same in optimizer steps, instead of the ratio."""
    decay_type: str = "cosine"
    """Shape of that fall: ``cosine``, ``linear`` or ``1-sqrt``."""
