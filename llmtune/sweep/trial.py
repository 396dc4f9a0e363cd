"""A trial of a sweep: its settings, its state, and how it can end."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from llmtune.sweep.space import Values


class TrialState(Enum):
    """The state of a trial."""

    unfinished = "unfinished"
    """It trains, or was stopped and goes on with the next start of the sweep."""
    finished = "finished"
    pruned = "pruned"
    """It was ended early, because it was worse than others."""
    failed = "failed"
    """It has no value: the training failed, or the plan said that it cannot fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A trial, as the sweep's file holds it."""

    number: int
    values: Values
    """The value of each searched key."""
    state: TrialState = TrialState.unfinished
    value: float | None = None
    """The metric of a finished trial, and the last one of a pruned trial."""
    reason: str = ""
    """The reason why it failed."""
    seconds: float = 0.0
    """Seconds from its beginning to its end, pauses included."""
    evaluations: dict[int, float] = field(default_factory=dict)
    """Optimizer step -> the metric at that step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialEnd:
    """The end of a start of a trial."""

    state: TrialState
    """``unfinished`` where it was stopped."""
    value: float | None = None
    reason: str = ""
    exit_code: int = 0
    does_not_fit: bool = False
    """The plan said so, and nothing was started."""
