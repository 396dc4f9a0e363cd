"""What may be asked for together: the best model, early stopping, and when evaluations come."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.config.best_model import BestModel, resolve_best_model
from llmtune.config.compose import compose_config
from llmtune.errors import ConfigError

EVALUATED = "train.eval_steps=5"


def best_of(*overrides: str) -> BestModel | None:
    return resolve_best_model(compose_config(["model=tiny", *overrides]).config)


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_config(["model=tiny", *overrides])
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "metric", "greater", "loads"),
    [
        (["checkpoint.metric_for_best_model=loss"], "eval_loss", False, False),
        (["checkpoint.metric_for_best_model=eval_loss"], "eval_loss", False, False),
        (["checkpoint.metric_for_best_model=perplexity"], "eval_perplexity", False, False),
        (
            ["checkpoint.metric_for_best_model=loss", "checkpoint.greater_is_better=true"],
            "eval_loss",
            True,
            False,
        ),
        (["train.load_best_model_at_end=true"], "eval_loss", False, True),
        (["train.early_stopping_patience=2"], "eval_loss", False, False),
    ],
)
def test_a_metric_is_known_with_and_without_its_prefix_and_has_its_direction(
    overrides: list[str], metric: str, greater: bool, loads: bool
) -> None:
    for evaluated in (EVALUATED, "train.eval_strategy=epoch"):
        best = best_of(evaluated, *overrides)
        assert best is not None
        assert (best.metric, best.greater_is_better) == (metric, greater)
        assert (best.load_at_end, best.is_saved) == (loads, True)


def test_nothing_is_chosen_unless_something_asks_for_it() -> None:
    assert best_of() is None
    assert best_of(EVALUATED, "checkpoint.greater_is_better=false") is None
    assert best_of("train.load_best_model_at_end=false") is None
    stops = best_of(EVALUATED, "train.early_stopping_patience=2", "train.save_strategy=no")
    assert stops is not None
    assert not stops.is_saved, "who wants no checkpoints gets none of the best either"


@pytest.mark.parametrize(
    "metric",
    ["eval_f1", "eval_accuracy", "eval_matthews", "eval_pearson", "eval_exact_match"],
)
def test_a_greater_value_of_most_metrics_is_better(metric: str) -> None:
    config = compose_config(["model=tiny", EVALUATED]).config
    config.checkpoint.metric_for_best_model = metric
    best = resolve_best_model(config)
    assert best is not None
    assert best.greater_is_better
    config.checkpoint.metric_for_best_model = "mse"
    best = resolve_best_model(config)
    assert best is not None
    assert (best.goal, best.is_better(0.5, 0.6), best.is_better(0.6, 0.5)) == (
        "min eval_mse",
        True,
        False,
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("checkpoint.metric_for_best_model=bleu", "evaluations have eval_loss and eval_perplexity"),
        ("train.eval_strategy=epochs", "train.eval_strategy=epochs: steps, epoch or no"),
        ("train.save_strategy=true", "train.save_strategy=True: steps, epoch or no"),
        (
            "train.eval_strategy=epoch train.eval_steps=5",
            "train.eval_steps=5 means nothing with train.eval_strategy=epoch",
        ),
        (
            "train.eval_strategy=no train.eval_steps=5",
            "train.eval_steps=5 means nothing with train.eval_strategy=no",
        ),
        (
            "train.early_stopping_patience=2",
            "train.early_stopping_patience=2 needs evaluations during training",
        ),
        (
            "train.early_stopping_patience=2 train.eval_strategy=no",
            "(it is no, with train.eval_steps=null)",
        ),
        (
            "train.early_stopping_patience=2 train.eval_steps=5 data.val_set_size=0",
            "train.early_stopping_patience=2 needs rows to evaluate on",
        ),
        ("train.load_best_model_at_end=true", "needs evaluations during training"),
        (
            "train.load_best_model_at_end=true train.eval_steps=5 train.save_strategy=no",
            "train.load_best_model_at_end=true needs checkpoints",
        ),
        ("train.early_stopping_patience=0", "train.early_stopping_patience=0: must be above 0"),
        (
            "train.early_stopping_threshold=-1 train.early_stopping_patience=1 train.eval_steps=5",
            "train.early_stopping_threshold=-1.0: must not be negative",
        ),
        ("train.early_stopping_threshold=0.1", "needs train.early_stopping_patience"),
        ("train.load_best_model_at_end=maybe", "'auto', true or false"),
        ("checkpoint.greater_is_better=less", "'auto', true or false"),
        (
            "data.streaming=true data.train=a.jsonl train.max_steps=5 train.save_strategy=epoch",
            "a stream has no epochs; take steps, with train.save_steps",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_begins(overrides: str, said: str) -> None:
    assert said in refusal(*overrides.split())


@pytest.mark.parametrize(
    "overrides",
    [
        "train.save_steps=7 train.eval_steps=5 checkpoint.metric_for_best_model=loss",
        "train.save_steps=null train.eval_steps=5 train.load_best_model_at_end=true",
        "train.eval_strategy=epoch train.save_strategy=epoch train.early_stopping_patience=1",
        "train.eval_strategy=no train.save_strategy=no",
        "train.save_strategy=epoch train.save_steps=50",
        "train.eval_steps=5 data.eval=a.jsonl data.val_set_size=0 train.early_stopping_patience=1",
    ],
)
def test_what_can_be_done_is_taken(overrides: str) -> None:
    compose_config(["model=tiny", *overrides.split()])


def test_a_strategy_that_yaml_reads_as_false_is_no(tmp_path: Path) -> None:
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _global_\ntrain:\n  eval_strategy: no\n")
    config = compose_config(["model=tiny", "experiment=mine"], str(tmp_path)).config
    assert config.train.eval_strategy is False
    assert compose_config(["model=tiny", "train.eval_strategy=no"]).config.train.eval_strategy in (
        "no",
        False,
    )
