"""The best evaluation so far, and how many in a row have not improved on it.

The rule is that of transformers' ``Trainer._determine_best_metric`` and ``EarlyStoppingCallback``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtune.config.best_model import BestModel
from llmtune.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class BestSoFar:
    """The state of the choice between two steps; without a rule it stays empty."""

    value: float | None = None
    """The best value; None where no evaluation had a number."""
    step: int | None = None
    """The optimizer step after which it was measured."""
    stale: int | None = None
    """Evaluations in a row without an improvement above the threshold; None before the first."""

    def describe(self, rule: BestModel | None) -> dict[str, Any] | None:
        """Return ``metric``, ``value`` and ``step``, as files have them; None without a best."""
        if rule is None or self.step is None:
            return None
        return {"metric": rule.metric, "value": self.value, "step": self.step}

    def summarize(self, rule: BestModel) -> dict[str, float]:
        """Return the step and the value for the summary of an experiment tracker."""
        if self.step is None or self.value is None:
            return {}
        return {"best_step": self.step, f"best_{rule.metric}": self.value}


def update_best(rule: BestModel | None, best: BestSoFar, record: Mapping[str, Any]) -> BestSoFar:
    """Take an evaluation into account; the one before the first step does not count.

    Args:
        record: ``step``, and the metrics by name.

    Raises:
        ConfigError: The evaluation does not have the metric.
    """
    if rule is None:
        return best
    if rule.metric not in record:
        known = ", ".join(sorted(key for key in record if key.startswith("eval_")))
        raise ConfigError(
            f"checkpoint.metric_for_best_model={rule.metric}: this evaluation has {known}"
        )
    if record["step"] == 0:
        return best
    value = float(record[rule.metric])
    is_better = rule.is_better(value, best.value)
    # Transformers' callback compares with the best before this evaluation. The first one counts as
    # an improvement, even where it is not a number.
    improvement = float("inf") if best.value is None else abs(value - best.value)
    improves = best.stale is None or (is_better and improvement > rule.threshold)
    stale = 0 if improves else (best.stale or 0) + 1
    if is_better:
        return BestSoFar(value=value, step=int(record["step"]), stale=stale)
    return BestSoFar(value=best.value, step=best.step, stale=stale)


def ends_early(rule: BestModel | None, best: BestSoFar) -> bool:
    """Tell whether the patience is over."""
    if rule is None or rule.patience is None or best.stale is None:
        return False
    return best.stale >= rule.patience
