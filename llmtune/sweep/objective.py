"""The value by which trials are compared: a metric of evaluations, and its better end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmtune.config.best_model import (
    METRICS,
    evaluates,
    is_greater_better,
    may_hold_out,
    metric_key,
    resolve_best_model,
)
from llmtune.config.groups.train import NO, strategy_name
from llmtune.config.groups.verbs.hparams_search import Direction, Pruner
from llmtune.config.schema import Config
from llmtune.task.task import find_task


@dataclass(frozen=True, slots=True)
class Objective:
    """A metric and its better end."""

    metric: str
    """A key of evaluation lines."""
    maximize: bool

    @property
    def goal(self) -> str:
        """The metric with its better end, such as ``min eval_loss``."""
        return f"{'max' if self.maximize else 'min'} {self.metric}"

    @classmethod
    def from_goal(cls, goal: str) -> Objective:
        """Undo :attr:`goal`."""
        end, _, metric = goal.partition(" ")
        return cls(metric, end == "max")


def resolve_objective(config: Config) -> Objective:
    """Return the objective of a sweep: by default that by which a run chooses its best model.

    Args:
        config: The configuration of a trial, with its task.
    """
    search, best = config.hparams_search, resolve_best_model(config)
    if search.metric is not None:
        metric = metric_key(search.metric)
        maximize = is_greater_better(metric)
        if best is not None and best.metric == metric:
            maximize = best.greater_is_better
    elif best is not None:
        metric, maximize = best.metric, best.greater_is_better
    else:
        task = find_task(config.model.task)
        metric, maximize = task.metric, task.greater_is_better
    if search.direction is not Direction.auto:
        maximize = search.direction is Direction.maximize
    return Objective(metric, maximize)


def find_objective_problems(config: Config, objective: Objective) -> Iterator[str]:
    """Find that evaluations do not give the metric, or that there are none."""
    search, train = config.hparams_search, config.train
    task = find_task(config.model.task)
    known = ("eval_loss", *task.metric_keys) if task.metric_keys else METRICS
    if objective.metric not in known:
        yield (
            f"hparams_search.metric={search.metric or objective.metric}: evaluations of"
            f" {task.title} have {', '.join(known)}"
        )
    if strategy_name(train.eval_strategy) == NO:
        yield ("train.eval_strategy=no: trials are compared by evaluations; take steps or epoch")
    elif not may_hold_out(config):
        yield (
            "a sweep compares trials by held-out rows, and there are none: add data.eval=FILE, or"
            " a data.val_set_size"
        )
    elif search.pruner is Pruner.median and not evaluates(train):
        yield (
            "hparams_search.pruner=median needs evaluations during training: set train.eval_steps,"
            " or train.eval_strategy=epoch"
        )


def resolve_pruning(config: Config) -> bool:
    """Tell whether trials are ended early."""
    pruner = config.hparams_search.pruner
    return pruner is Pruner.median or (pruner is Pruner.auto and evaluates(config.train))
