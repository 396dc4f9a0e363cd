"""A sweep is checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtune.config.compose import compose_config, config_groups
from llmtune.config.groups.verbs.hparams_search import HparamsSearchConfig
from llmtune.errors import CheckpointError, ConfigError
from llmtune.sweep.record import check_record
from llmtune.sweep.settings import SweepSettings, resolve_sweep
from llmtune.sweep.trial import Trial
from llmtune.task.task import TASKS
from tests.support import TINY

JOB = [*TINY, "data.train=stdlib_docs@40", "train.max_steps=4"]
SEARCH = ["hparams_search.space.tuner.lora_r.choices=[4,8]"]


def resolve(*overrides: str) -> SweepSettings:
    return resolve_sweep(compose_config([*JOB, *overrides]), None)


def test_the_command_of_a_trial_is_the_sweeps_without_the_search(tmp_path: Path) -> None:
    found = resolve(
        *SEARCH, "hparams_search.trials=3", f"output_dir={tmp_path}/mine", "run_name=x", "seed=7"
    )
    assert found.folder == tmp_path / "mine"
    # TINY asks for no answers already.
    assert found.command.overrides == [*JOB, "seed=7"]
    assert found.command.default_overrides == ["export=none"]
    trial = Trial(number=0, values={"tuner.lora_r": 8})
    assert found.command.describe(trial)[-2:] == ["export=none", "tuner.lora_r=8"]
    # Who trains with these settings again wants a model.
    assert "export=none" not in found.command.describe_again(trial)
    assert found.command.name == "mine"
    assert (found.objective.metric, found.objective.maximize) == ("eval_loss", False)
    assert found.command_line.startswith("python -m llmtune sweep model=tiny")
    assert not found.prunes
    assert resolve(*SEARCH, "train.eval_steps=2").prunes
    assert not resolve(*SEARCH, "train.eval_steps=2", "hparams_search.pruner=none").prunes


def test_the_folder_is_not_that_of_a_training() -> None:
    assert str(resolve(*SEARCH).folder) == "runs/tiny-lora-stdlib_docs-sweep"
    assert str(resolve(*SEARCH, "run_name=x").folder) == "runs/x-sweep"


def test_exports_and_answers_are_left_out_unless_asked_for() -> None:
    job = ["model=tiny", "data.train=stdlib_docs@40", *SEARCH]
    found = resolve_sweep(compose_config(job), None)
    assert found.command.default_overrides == ["export=none", "train.sample_answers=false"]
    found = resolve_sweep(compose_config([*job, "export=adapter"]), None)
    assert found.command.default_overrides == ["train.sample_answers=false"]


def test_the_plan_is_asked_about_the_default_jobs_rows() -> None:
    found = resolve_sweep(compose_config(["model=tiny", *SEARCH]), None)
    assert found.command.plan_overrides == ["data=stdlib_docs"]
    assert resolve(*SEARCH).command.plan_overrides == []


@pytest.mark.parametrize("option", ["lora", "full"])
def test_an_option_can_be_searched(option: str) -> None:
    found = resolve(f"hparams_search={option}", f"tuner={option}")
    assert len(found.space) >= 4
    changed = resolve(
        f"hparams_search={option}",
        f"tuner={option}",
        "hparams_search.space.optim.learning_rate.high=0.5",
        "hparams_search.space.schedule.warmup_ratio=null",
    )
    assert len(changed.space) == len(found.space) - 1
    (rate,) = (p for p in changed.space if p.key == "optim.learning_rate")
    assert (rate.high, rate.is_log) == (0.5, True)


def test_a_classifier_is_searched_by_its_own_metric(tmp_path: Path) -> None:
    rows = "".join(f'{{"text": "row {n}", "label": "{"ab"[n % 2]}"}}\n' for n in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    job = ["model=tiny_bert", f"data.train={tmp_path}/rows.jsonl", "data.val_set_size=8"]
    job += ["hparams_search=classification", "tuner=full"]
    found = resolve_sweep(compose_config(job), None)
    assert (found.objective.metric, found.objective.maximize) == ("eval_f1", True)
    with pytest.raises(ConfigError, match="eval_perplexity: evaluations of"):
        resolve_sweep(compose_config([*job, "hparams_search.metric=eval_perplexity"]), None)
    chosen = resolve_sweep(compose_config([*job, "hparams_search.metric=loss"]), None)
    assert (chosen.objective.metric, chosen.objective.maximize) == ("eval_loss", False)
    turned = resolve_sweep(compose_config([*job, "hparams_search.direction=minimize"]), None)
    assert not turned.objective.maximize


def test_every_option_of_the_group_names_keys_that_there_are() -> None:
    assert config_groups()["hparams_search"] == {"lora", "full", "classification"}
    assert HparamsSearchConfig().space == {}


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ([], "hparams_search.space is empty: take hparams_search=lora"),
        (
            ["hparams_search.space.tuner.lora_rank.choices=[8]"],
            "hparams_search.space.tuner.lora_rank: unknown key 'tuner.lora_rank': did you mean"
            " 'tuner.lora_r'",
        ),
        (
            ["hparams_search.space.tuner.lora_r.choices=[8,0]"],
            "hparams_search.space.tuner.lora_r: tuner.lora_r=0 cannot be tried: tuner.lora_r=0:"
            " must be above 0",
        ),
        (
            ["hparams_search.space.tuner.lora_r.choices=[8,abc]"],
            "hparams_search.space.tuner.lora_r: tuner.lora_r=abc cannot be tried",
        ),
        (
            ["hparams_search.space.optim.choices=[adamw,adam]"],
            "hparams_search.space.optim: optim=adam cannot be tried: optim=adam: no such option",
        ),
        (
            ["hparams_search.space.schedule.warmup_ratio={low:0,high:2.0}"],
            "schedule.warmup_ratio=2.0 cannot be tried",
        ),
        (["hparams_search.space.tuner.lora_r={low:8,high:4}"], "low=8 must be below high=4"),
        (
            [*SEARCH, "tuner.lora_r=4"],
            "tuner.lora_r is set and searched; leave it out, or take"
            " hparams_search.space.tuner.lora_r=null",
        ),
        (["hparams_search=lora", "tuner=full"], "full fine-tuning does not read it"),
        (["hparams_search.space.output_dir.choices=[a,b]"], "cannot be searched"),
        (["hparams_search.space.export.format.choices=[pt]"], "cannot be searched"),
        (
            ["hparams_search.space.data.val_set_size.choices=[4,8]"],
            "the trials would be compared by different held-out rows",
        ),
        (["hparams_search.space.seed.choices=[1,2]"], "name them with data.eval=FILE"),
        ([*SEARCH, "hparams_search.metric=eval_f1"], "hparams_search.metric=eval_f1: evaluations"),
        ([*SEARCH, "hparams_search.metric=nonsense"], "have eval_loss, eval_perplexity"),
        ([*SEARCH, "train.eval_strategy=no"], "train.eval_strategy=no: trials are compared"),
        ([*SEARCH, "data.val_set_size=0"], "a sweep compares trials by held-out rows"),
        (
            [*SEARCH, "hparams_search.pruner=median"],
            "hparams_search.pruner=median needs evaluations during training",
        ),
        (
            ["hparams_search=lora", "hparams_search.sampler=grid"],
            "hparams_search.sampler=grid: hparams_search.space.optim.learning_rate has no end",
        ),
        ([*SEARCH, "hparams_search.trials=0"], "hparams_search.trials=0: must be above 0"),
        ([*SEARCH, "hparams_search.timeout=-1"], "hparams_search.timeout=-1"),
        ([*SEARCH, "tuner.lora_plus_ratio=-1"], "tuner.lora_plus_ratio=-1"),
        ([*SEARCH, "launch.hostfile=/tmp/hosts"], "launch.hostfile: the trials of a sweep"),
    ],
)
def test_what_cannot_work_is_refused_with_its_key(overrides: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(*overrides)
    assert problem in str(caught.value)


def test_ranks_of_a_launcher_are_no_place_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun, deepspeed or srun"):
        resolve(*SEARCH)


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("hparams_search.space.tuner.lora_r.choices=[4,16]", "hparams_search.space.tuner.lora_r:"),
        ("hparams_search.space.seed=null", None),
        ("hparams_search.space.tuner.lora_alpha.choices=[8,16]", "space.tuner.lora_alpha: - there"),
        ("train.max_steps=5", "train.max_steps: 4 there, 5 now"),
        ("optim.weight_decay=0.1", "optim.weight_decay: 0.0 there, 0.1 now"),
        ("hparams_search.direction=maximize", "min eval_loss there, max eval_loss now"),
        ("hparams_search.metric=perplexity", "min eval_loss there, min eval_perplexity now"),
        ("hparams_search.trials=50", None),
        ("hparams_search.sampler=random", None),
        ("train.save_steps=2", None),
        ("launch.nproc=1", None),
        ("tracker=tensorboard", None),
    ],
)
def test_another_sweep_in_the_same_folder_is_refused(override: str, difference: str | None) -> None:
    def record(*more: str) -> dict[str, Any]:
        return resolve(*SEARCH, *more).to_record()

    if difference is None:
        check_record(Path("x"), record(), record(override))
        return
    with pytest.raises(CheckpointError, match="x holds another sweep") as caught:
        check_record(Path("x"), record(), record(override))
    assert difference in str(caught.value)


def test_a_task_says_which_metrics_it_has() -> None:
    for task in TASKS.list().values():
        assert task.metric in ("eval_loss", *task.metric_keys)
