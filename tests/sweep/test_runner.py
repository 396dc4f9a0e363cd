"""One trial: the plan is asked, train runs, and its end is understood; no process is started."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from llmtune.errors import CheckpointError
from llmtune.launch.supervise.child_command import ChildEnd
from llmtune.launch.supervise.signals import StopRequests
from llmtune.storage.rank_files import FinishedRecord
from llmtune.sweep.runner import TrialCommand, TrialRunner
from llmtune.sweep.space import to_overrides
from llmtune.sweep.trial import Trial, TrialEnd, TrialState
from llmtune.track.console import Console

TRIAL = Trial(number=3, values={"tuner.lora_r": 8, "optim.learning_rate": 1e-05})
COMMAND = TrialCommand(
    overrides=["model=tiny"], plan_overrides=["data=stdlib_docs"], config_dir="/mine", name="s"
)


class Children:
    """Stands for the processes of ``plan`` and ``train``."""

    def __init__(self, plan: ChildEnd, train: ChildEnd | Callable[[Callable[[], bool]], ChildEnd]):
        self.commands: list[Sequence[str]] = []
        self._plan = plan
        self._train = train

    def __call__(
        self,
        arguments: Sequence[str],
        stops: StopRequests,
        poll: Callable[[], bool] = lambda: False,
        is_quiet: bool = False,
    ) -> ChildEnd:
        self.commands.append(arguments)
        if arguments[0] == "plan":
            assert is_quiet
            return self._plan
        return self._train if isinstance(self._train, ChildEnd) else self._train(poll)


#: Steps of the training.
TOTAL = 6
FITS, DONE = ChildEnd(exit_code=0, out='{"fits": true}'), ChildEnd(exit_code=0)


def write(folder: Path, *values: float | None, **finished: Any) -> Path:
    """The run folder of a training that has evaluated every two steps."""
    run = folder / "trial-0003"
    run.mkdir(exist_ok=True)
    lines = [{"step": 2 * n, "eval_loss": value} for n, value in enumerate(values)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "plan.json").write_text(json.dumps({"steps": {"total_steps": TOTAL}}))
    if finished:
        FinishedRecord(step=TOTAL, **finished).write(run)
    return run


def run(
    folder: Path,
    children: Children,
    monkeypatch: pytest.MonkeyPatch,
    judge: Callable[[int, float], bool] = lambda *_: False,
    stops: StopRequests | None = None,
) -> TrialEnd:
    monkeypatch.setattr("llmtune.sweep.runner.run_child", children)
    return make_runner(folder, "eval_loss", stops).run(TRIAL, judge)


def make_runner(folder: Path, metric: str, stops: StopRequests | None = None) -> TrialRunner:
    return TrialRunner(folder, COMMAND, metric, stops or StopRequests(), console=Console(None))


def test_the_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(_: Callable[[], bool]) -> ChildEnd:
        write(tmp_path, 2.0, 1.0, tokens=1)
        return DONE

    children = Children(FITS, train)
    end = run(tmp_path, children, monkeypatch)
    assert end == TrialEnd(state=TrialState.finished, value=1.0)
    job = ["--config-dir", "/mine", "model=tiny", "tuner.lora_r=8", "optim.learning_rate=1e-05"]
    folder = f"output_dir={tmp_path}/trial-0003"
    assert children.commands == [
        ["plan", "--json", *job, "data=stdlib_docs"],
        ["train", *job, folder, "run_name=s-trial-0003"],
    ]
    # What has begun is not planned again.
    children.commands.clear()
    run(tmp_path, children, monkeypatch)
    assert [command[0] for command in children.commands] == ["train"]


def test_what_cannot_fit_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ChildEnd(exit_code=3, out=json.dumps({"fits": False, "message": "needs 90 GB"}))
    children = Children(plan, DONE)
    end = run(tmp_path, children, monkeypatch)
    assert (end.state, end.reason, end.does_not_fit) == (TrialState.failed, "needs 90 GB", True)
    assert len(children.commands) == 1


@pytest.mark.parametrize(
    ("plan", "train", "state", "reason", "code"),
    [
        (ChildEnd(exit_code=2, error="a=b: no"), DONE, "failed", "a=b: no", 2),
        (ChildEnd(exit_code=130), DONE, "unfinished", "", 0),
        (FITS, ChildEnd(exit_code=4, error="a.jsonl:3: no"), "failed", "a.jsonl:3: no", 4),
        (FITS, ChildEnd(exit_code=1), "failed", "ended with code 1", 1),
        (FITS, ChildEnd(exit_code=-9), "failed", "ended by signal 9", 1),
        (FITS, ChildEnd(exit_code=75), "unfinished", "", 0),
        (FITS, ChildEnd(exit_code=-15), "unfinished", "", 0),
        (FITS, ChildEnd(exit_code=143), "unfinished", "", 0),
        (FITS, DONE, "failed", "its folder has no finished.json", 1),
    ],
)
def test_how_it_ended(
    plan: ChildEnd,
    train: ChildEnd,
    state: str,
    reason: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    end = run(tmp_path, Children(plan, train), monkeypatch)
    assert (end.state.value, end.reason, end.exit_code) == (state, reason, code)


def test_a_failure_while_the_sweep_is_stopped_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = StopRequests()
    stops.received.append(signal.SIGTERM)
    children = Children(FITS, ChildEnd(exit_code=1, error="the pipe broke"))
    assert run(tmp_path, children, monkeypatch, stops=stops).state is TrialState.unfinished


@pytest.mark.parametrize(
    ("values", "finished", "value"),
    [
        ((3.0, 2.0, 1.5), {"tokens": 1}, 1.5),
        ((3.0, 1.0, 1.5), {"best": {"metric": "eval_loss", "value": 1.0, "step": 2}}, 1.5),
        (
            (3.0, 1.0, 1.5),
            {"best": {"metric": "eval_loss", "value": 1.0, "step": 2}, "loaded_best": True},
            1.0,
        ),
        (
            (3.0, 1.0, 1.5),
            {"best": {"metric": "eval_f1", "value": 0.9, "step": 2}, "loaded_best": True},
            1.5,
        ),
    ],
)
def test_the_value_is_that_of_the_published_model(
    values: tuple[float, ...],
    finished: dict[str, Any],
    value: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path, *values, **finished)
    assert run(tmp_path, Children(FITS, DONE), monkeypatch).value == value


def test_a_value_that_is_not_finite_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 3.0, None, tokens=1)
    end = run(tmp_path, Children(FITS, DONE), monkeypatch)
    assert (end.state, end.reason) == (TrialState.failed, "eval_loss is not finite")
    monkeypatch.setattr("llmtune.sweep.runner.run_child", Children(FITS, DONE))
    other = make_runner(tmp_path, "eval_f1").run(TRIAL, lambda *_: False)
    assert other.reason == "eval_f1 is not in its evaluations (eval_loss)"


def test_a_bad_trial_is_stopped_and_loses_its_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[tuple[int, float]] = []

    def judge(step: int, value: float) -> bool:
        judged.append((step, value))
        return value > 5

    def train(poll: Callable[[], bool]) -> ChildEnd:
        assert not poll()
        write(tmp_path, 9.0, 4.0)
        assert not poll()
        folder = write(tmp_path, 9.0, 4.0, 8.0)
        checkpoint = folder / "checkpoint-4"
        checkpoint.mkdir()
        (checkpoint / "COMPLETE").touch()
        assert poll()
        return ChildEnd(exit_code=75)

    end = run(tmp_path, Children(FITS, train), monkeypatch, judge)
    assert end == TrialEnd(state=TrialState.pruned)
    assert judged == [(2, 4.0), (4, 8.0)]
    assert not (tmp_path / "trial-0003" / "checkpoint-4").exists()
    # The sweep was killed before it stored that: nothing is started.
    children = Children(FITS, DONE)
    assert run(tmp_path, children, monkeypatch, judge).state is TrialState.pruned
    assert children.commands == []


def test_the_folder_of_another_run_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one of a sweep whose file was replaced by an older copy."""
    folder = write(tmp_path, 9.0, 4.0, 8.0)
    checkpoint = folder / "checkpoint-4"
    checkpoint.mkdir()
    (checkpoint / "COMPLETE").touch()
    own = [*COMMAND.overrides, *to_overrides(TRIAL.values), f"output_dir={folder}"]
    children = Children(FITS, ChildEnd(exit_code=75))
    (folder / "overrides.yaml").write_text(json.dumps([*own[:1], "tuner.lora_r=16", *own[2:]]))
    with pytest.raises(CheckpointError, match="holds a run without tuner.lora_r=8"):
        run(tmp_path, children, monkeypatch, lambda *_: True)
    assert checkpoint.exists()
    assert children.commands == []
    (folder / "overrides.yaml").write_text(json.dumps(own))
    assert run(tmp_path, children, monkeypatch, lambda *_: True).state is TrialState.pruned


def test_the_last_evaluation_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(poll: Callable[[], bool]) -> ChildEnd:
        write(tmp_path, 9.0, 8.0, 8.0, 8.0, tokens=1)
        assert not poll()
        return DONE

    children = Children(FITS, train)
    end = run(tmp_path, children, monkeypatch, lambda step, _: step == 6)
    assert (end.state, end.value) == (TrialState.finished, 8.0)
