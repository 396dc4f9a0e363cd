"""The choice of a run's best model: by which metric, and what follows from it.

The keys mean what they mean to transformers' Trainer; docs/checkpoints.md says where they differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmtune.config.groups.train import EPOCH, NO, STEPS, TrainConfig, strategy_name
from llmtune.config.schema import Config

#: Metrics of the evaluation lines of ``metrics.jsonl``, of all tasks (docs/metrics.md).
METRICS = (
    *("eval_loss", "eval_perplexity", "eval_token_accuracy"),
    *("eval_accuracy", "eval_f1", "eval_f1_micro", "eval_precision", "eval_recall"),
    *("eval_matthews", "eval_auroc", "eval_mse", "eval_pearson", "eval_spearman"),
)

#: Ends of the names of metrics of which a smaller value is better.
_SMALLER_IS_BETTER = ("loss", "perplexity", "mse")


#: The metric of language modeling; those of other tasks are put into the configuration when the
#: task is known (``run/task.py``).
DEFAULT_METRIC = "eval_loss"


@dataclass(frozen=True, slots=True, kw_only=True)
class BestModel:
    """The rule by which the best evaluation of a run is found, and what becomes of it."""

    metric: str
    """A key of evaluation lines."""
    greater_is_better: bool
    is_saved: bool
    """A new best is saved at once, and its checkpoint is kept."""
    load_at_end: bool
    """The best checkpoint is what the run publishes."""
    patience: int | None = None
    """Evaluations in a row without an improvement after which the run ends."""
    threshold: float = 0.0
    """Improvements up to this size do not count for ``patience``."""

    @property
    def goal(self) -> str:
        """The metric and its better end, such as ``min eval_loss``."""
        return f"{'max' if self.greater_is_better else 'min'} {self.metric}"

    def is_better(self, value: float, other: float | None) -> bool:
        """Tell whether a value is strictly better than another one; any number beats None.

        NaN is better than nothing, and neither is the worst of all values.
        """
        worst = float("-inf") if self.greater_is_better else float("inf")
        other = worst if other is None else other
        return value > other if self.greater_is_better else value < other


def resolve_best_model(config: Config) -> BestModel | None:
    """Return the rule of a run; None where nothing asks for a best model."""
    train, checkpoint = config.train, config.checkpoint
    load_at_end = train.load_best_model_at_end is True
    metric, patience = checkpoint.metric_for_best_model, train.early_stopping_patience
    if metric is None and not load_at_end and patience is None:
        return None
    metric = metric_key(metric) if metric is not None else DEFAULT_METRIC
    greater = checkpoint.greater_is_better
    return BestModel(
        metric=metric,
        greater_is_better=is_greater_better(metric) if isinstance(greater, str) else greater,
        is_saved=saves(train),
        load_at_end=load_at_end,
        patience=patience,
        threshold=train.early_stopping_threshold,
    )


def is_greater_better(metric: str) -> bool:
    """Tell by the name of a metric whether a greater value is better."""
    return not metric.endswith(_SMALLER_IS_BETTER)


def metric_key(name: str) -> str:
    """Return the key of evaluation lines that a name means: ``loss`` is ``eval_loss``."""
    return name if name.startswith("eval_") else f"eval_{name}"


def evaluates(train: TrainConfig) -> bool:
    """Tell whether there may be evaluations between the first step and the last."""
    strategy = strategy_name(train.eval_strategy)
    return strategy == EPOCH or (strategy == STEPS and train.eval_steps is not None)


def saves(train: TrainConfig) -> bool:
    """Tell whether there may be checkpoints before the last step."""
    return strategy_name(train.save_strategy) != NO


def can_choose(config: Config) -> bool:
    """Tell whether a best model can be chosen: there are evaluations, rows for them, and saves."""
    return evaluates(config.train) and saves(config.train) and may_hold_out(config)


def may_hold_out(config: Config) -> bool:
    """Tell whether rows to evaluate on are asked for."""
    data = config.data
    return data.eval is not None or (data.val_set_size > 0 and not data.streaming)


def find_best_model_problems(config: Config) -> Iterator[str]:
    """Find what is wrong with the strategies, and with the choice of the best model."""
    train = config.train
    yield from _find_strategy_problems(config)
    if train.early_stopping_threshold > 0 and train.early_stopping_patience is None:
        yield (
            f"train.early_stopping_threshold={train.early_stopping_threshold} needs"
            " train.early_stopping_patience: without it no run is stopped early"
        )
    metric = config.checkpoint.metric_for_best_model
    if metric is not None and metric_key(metric) not in METRICS:
        yield (
            f"checkpoint.metric_for_best_model={metric}: evaluations have {' and '.join(METRICS)}"
        )
    asking = _name_what_asks(config)
    if asking is None:
        return
    if not evaluates(train):
        strategy = strategy_name(train.eval_strategy)
        yield (
            f"{asking} needs evaluations during training: set train.eval_steps, or"
            f" train.eval_strategy=epoch (it is {strategy}, with train.eval_steps="
            f"{_show(train.eval_steps)})"
        )
    if not may_hold_out(config):
        yield f"{asking} needs rows to evaluate on: add data.eval=FILE, or a data.val_set_size"
    if train.load_best_model_at_end is True and not saves(train):
        yield (
            "train.load_best_model_at_end=true needs checkpoints: train.save_strategy=no saves none"
            " before the end. Take steps or epoch (train.save_steps=null then saves the best alone)"
        )


def _name_what_asks(config: Config) -> str | None:
    """Name the key that asks for a best model, for a message; None where no key does."""
    train, metric = config.train, config.checkpoint.metric_for_best_model
    if train.early_stopping_patience is not None:
        return f"train.early_stopping_patience={train.early_stopping_patience}"
    if train.load_best_model_at_end is True:
        return "train.load_best_model_at_end=true"
    return f"checkpoint.metric_for_best_model={metric}" if metric is not None else None


def _find_strategy_problems(config: Config) -> Iterator[str]:
    train = config.train
    given = {"train.eval_strategy": train.eval_strategy, "train.save_strategy": train.save_strategy}
    for key, value in given.items():
        strategy = strategy_name(value)
        if strategy not in (STEPS, EPOCH, NO):
            yield f"{key}={value}: steps, epoch or no"
        elif strategy == EPOCH and config.data.streaming:
            yield (
                f"{key}=epoch with data.streaming=true: a stream has no epochs; take steps, with"
                f" {key.removesuffix('strategy')}steps"
            )
    # train.save_steps has a default, so that nobody can tell whether it was set.
    strategy = strategy_name(train.eval_strategy)
    if train.eval_steps is not None and strategy in (EPOCH, NO):
        yield (
            f"train.eval_steps={train.eval_steps} means nothing with"
            f" train.eval_strategy={strategy}: leave one of them out"
        )


def _show(value: int | None) -> str:
    return "null" if value is None else str(value)
