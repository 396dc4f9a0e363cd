"""What a run says about its best model, and which checkpoint becomes its result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmtune.checkpoint.best import BestSoFar
from llmtune.checkpoint.result import choose_result
from llmtune.config.best_model import BestModel, resolve_best_model
from llmtune.config.compose import compose_config
from llmtune.config.schema import Config
from llmtune.errors import ConfigError
from llmtune.plan.prepared_data import PreparedData, SplitSummary
from llmtune.plan.steps import StepsPlan
from llmtune.run.describe import describe_checkpoints, describe_evaluations
from llmtune.run.finish import describe_end, finished_message
from llmtune.run.prepare import check_evaluations
from llmtune.storage.rank_files import FinishedRecord
from llmtune.track.tracker import Outcome, Record, Trackers
from llmtune.train.request import RunRequest
from llmtune.train.run_folder import RunFolder
from tests.checkpoint.test_retention import make

ASKED = ["train.eval_steps=5", "train.early_stopping_patience=2"]
STEPS = StepsPlan(
    total_steps=20,
    warmup_steps=0,
    total_rows=None,
    origin="",
    epoch_rows=40,
    global_batch_size=8,
)


def config_of(*overrides: str) -> Config:
    return compose_config(["model=tiny", *overrides]).config


def data_of(held_out: int | None) -> PreparedData:
    counts: dict[str, int] = dict.fromkeys(
        ("documents", "tokens", "supervised_tokens", "dropped", "truncated", "skipped"), 0
    )
    return PreparedData(
        folder="",
        fingerprint="",
        train=SplitSummary(rows=40, **counts),
        eval=None if held_out is None else SplitSummary(rows=held_out, **counts),
        train_stores=[],
        eval_stores=[],
        special_tokens=[],
        classes=[],
        fatal=0,
        left_out=0,
    )


def best_of(*overrides: str) -> BestModel:
    best = resolve_best_model(config_of(*ASKED, *overrides))
    assert best is not None
    return best


@pytest.mark.parametrize("held_out", [None, 0])
def test_early_stopping_without_a_held_out_row_is_refused(held_out: int | None) -> None:
    with pytest.raises(ConfigError, match="eval_loss is to choose the best model, and no row"):
        check_evaluations(config_of(*ASKED), data_of(held_out), STEPS, print)
    check_evaluations(config_of(), data_of(held_out), STEPS, print)


def test_early_stopping_needs_evaluations_before_the_end() -> None:
    said: list[str] = []
    config = config_of(*ASKED)
    check_evaluations(config, data_of(9), STEPS, said.append)
    assert said == []
    check_evaluations(config, data_of(9), replace(STEPS, total_steps=15), said.append)
    assert said == [
        "warning: train.early_stopping_patience=2 cannot stop this run early: it needs 3"
        " evaluations before the end, and there are 2"
    ]
    with pytest.raises(ConfigError, match="no evaluation comes before the end of the 5 steps"):
        check_evaluations(config, data_of(9), replace(STEPS, total_steps=5), said.append)
    # The last evaluation is enough to choose by.
    check_evaluations(
        config_of("train.eval_steps=5", "train.load_best_model_at_end=true"),
        data_of(9),
        replace(STEPS, total_steps=5),
        said.append,
    )


@pytest.mark.parametrize(
    ("overrides", "evaluations", "checkpoints"),
    [
        (
            [],
            "none before the end, at step 0 and at the end",
            "every 100 steps (0 before the end), and at the end; kept: the newest 2",
        ),
        (["train.eval_strategy=no"], "none", "every 100 steps (0 before the end), and at the end;"),
        (
            [*ASKED, "train.early_stopping_threshold=0.1", "train.save_strategy=epoch"],
            "every 5 steps (3 before the end), at step 0 and at the end; the run ends after 2"
            " evaluations in a row in which eval_loss does not improve by more than 0.1",
            "every epoch (3 before the end), at each new best eval_loss, and at the end; kept: the"
            " newest 2 and the best",
        ),
        (
            [
                "train.eval_strategy=epoch",
                "train.load_best_model_at_end=true",
                "train.save_total_limit=null",
            ],
            "every epoch (3 before the end), at step 0 and at the end",
            "every 100 steps (0 before the end), at each new best eval_loss, and at the end; all"
            " are kept; the best is published",
        ),
    ],
)
def test_the_page_before_step_1_says_how_often_they_come(
    overrides: list[str], evaluations: str, checkpoints: str
) -> None:
    request: Any = SimpleNamespace(config=config_of(*overrides), steps=STEPS, data=data_of(9))
    request.evaluates = RunRequest.evaluates.fget(request)  # type: ignore[attr-defined]
    assert describe_evaluations(request) == evaluations
    assert describe_checkpoints(request).startswith(checkpoints)


def test_a_run_that_was_stopped_early_is_finished_until_the_patience_is_raised(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path)
    assert not folder.is_finished(20, None)
    best = {"metric": "eval_loss", "value": 1.5, "step": 5}
    record = FinishedRecord(
        step=15,
        best=best,
        goal="min eval_loss",
        published_step=15,
        stale_evaluations=2,
        stopped_early=True,
    )
    record.write(tmp_path)
    assert folder.is_finished(20, best_of())
    assert folder.is_finished(40, best_of()), "nor does it train on with more steps"
    assert not folder.is_finished(20, best_of("train.early_stopping_patience=3"))
    assert not folder.is_finished(20, None)
    assert folder.is_finished(15, None)


def test_a_run_that_published_another_model_than_is_asked_for_is_not_finished(
    tmp_path: Path,
) -> None:
    folder, loads = RunFolder(tmp_path), best_of("train.load_best_model_at_end=true")
    FinishedRecord(step=20).write(tmp_path)
    assert folder.is_finished(20, best_of())
    assert not folder.is_finished(20, loads)
    FinishedRecord(step=20, goal="min eval_loss", loaded_best=True).write(tmp_path)
    assert folder.is_finished(20, loads)
    assert not folder.is_finished(20, None)
    assert not folder.is_finished(20, replace(loads, metric="eval_perplexity"))
    (tmp_path / "finished.json").write_text('{"step": 20, "best": null}')
    assert folder.is_finished(20, None), "of an earlier version"


def test_the_end_says_which_step_the_model_is_of(tmp_path: Path) -> None:
    best = {"metric": "eval_loss", "value": 1.5, "step": 5}
    early = FinishedRecord(
        step=15,
        best=best,
        goal="min eval_loss",
        published_step=5,
        loaded_best=True,
        stale_evaluations=2,
        stopped_early=True,
    )
    assert describe_end(early) == (
        "; stopped early: eval_loss did not improve in 2 evaluations"
        " (train.early_stopping_patience; null or a larger one trains on); best eval_loss 1.5000 at"
        " step 5; the trained model is that of step 5, the best"
    )
    kept = FinishedRecord(step=20, best=best, goal="min eval_loss", published_step=20)
    assert describe_end(kept) == (
        "; best eval_loss 1.5000 at step 5; the trained model is that of step 20, the last"
    )
    assert describe_end(FinishedRecord(step=20)) == ""
    early.write(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 15, "loss": 2.0}) + "\n")
    assert "is at step 15; training loss 2.0000 -> 2.0000; stopped early" in finished_message(
        tmp_path
    )


def test_the_result_is_the_best_checkpoint_or_what_is_left_of_them(tmp_path: Path) -> None:
    for step, loss in {2: 0.7, 4: 0.5, 6: 0.9}.items():
        make(tmp_path, step, eval_loss=loss)
    last, said = tmp_path / "checkpoint-6", list[str]()
    loads, best = best_of("train.load_best_model_at_end=true"), BestSoFar(value=0.5, step=4)
    assert choose_result(last, best_of(), best, said.append) == last
    assert choose_result(last, None, BestSoFar(), said.append) == last
    assert choose_result(last, loads, BestSoFar(), said.append) == last, "no number was measured"
    assert choose_result(last, loads, best, said.append) == tmp_path / "checkpoint-4"
    assert choose_result(last, loads, BestSoFar(value=0.9, step=6), said.append) == last
    assert said == []
    (tmp_path / "checkpoint-4" / "x").write_text("?")
    assert choose_result(last, loads, best, said.append) == tmp_path / "checkpoint-2"
    assert "warning: eval_loss was best at step 4 (0.5), and" in said[0]
    assert "x has other contents" in said[0]
    assert said[0].endswith("checkpoint-2 is published instead")
    gone = BestSoFar(value=0.1, step=1)
    assert choose_result(last, loads, gone, said.append) == tmp_path / "checkpoint-2"
    assert "it was never finished" in said[1]


def test_trackers_that_keep_a_summary_get_the_best_value() -> None:
    class Plain:
        def log(self, record: Record) -> None: ...

        def finish(self, outcome: Outcome) -> None: ...

    class Summary(Plain):
        values: Record | None = None

        def summarize(self, values: Record) -> None:
            self.values = values

    class Broken(Plain):
        def summarize(self, values: Record) -> None:
            raise OSError("no network")

    summary, said = Summary(), list[str]()
    Trackers([Plain(), Broken(), summary], said.append).summarize({"best_step": 4})
    assert summary.values == {"best_step": 4}
    assert len(said) == 1
    assert "the tracker Broken failed and is left out" in said[0]
