"""The keys of ``hparams_search``, for ``llmtune sweep``."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Direction(Enum):
    """The better end of the metric."""

    auto = "auto"
    minimize = "minimize"
    maximize = "maximize"


class Sampler(Enum):
    """The choice of the next settings to try."""

    tpe = "tpe"
    """Near those that were good (Optuna's tree-structured Parzen estimator)."""
    random = "random"
    grid = "grid"
    """Every combination, in order; ranges need a ``step`` or whole numbers."""


class Pruner(Enum):
    """The rule by which a trial is ended early."""

    auto = "auto"
    """``median`` where the run evaluates while it trains, otherwise ``none``."""
    median = "median"
    """A trial whose best value so far is worse than the median of the others at that step."""
    none = "none"


@dataclass(slots=True, kw_only=True)
class HparamsSearchConfig:
    """The search of ``llmtune sweep``: which settings, how many trials, judged by what."""

    space: dict[str, Any] = field(default_factory=dict)
    """Dotted key or config group -> ``{low, high, log, step}`` or ``{choices: [...]}``.

    Whole numbers as ``low`` and ``high`` make a range of whole numbers. Null takes a key out.
    """
    trials: int = 20
    """Trials of the sweep in all, over all of its starts; failed and pruned ones count."""
    metric: str | None = None
    """A key of evaluation lines; null takes the one by which a run chooses its best model."""
    direction: Direction = Direction.auto
    """``minimize``, ``maximize``, or ``auto``, which goes by the name of the metric."""
    sampler: Sampler = Sampler.tpe
    """``tpe``, ``random`` or ``grid``."""
    pruner: Pruner = Pruner.auto
    """``median``, ``none`` or ``auto``."""
    pruner_startup_trials: int = 5
    """Finished trials before any is ended early."""
    pruner_warmup_steps: int = 0
    """Optimizer steps of a trial before it may be ended early."""
    seed: int = 42
    """Seed of the settings that are tried; trials train with ``seed``."""
    timeout: float | None = None
    """Seconds after which a command begins no further trial; null for no limit."""
