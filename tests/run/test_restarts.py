"""Ranks that failed are started again from the newest checkpoint, as long as that gets the run
on.
"""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmtune.checkpoint.find import find_checkpoints
from llmtune.config.composed import Composed
from llmtune.config.groups.verbs.report import ReportConfig
from llmtune.config.schema import Config
from llmtune.errors import CheckpointError, LlmtuneError, StoppedError
from llmtune.launch.supervise import restarts as restarts_module
from llmtune.launch.supervise import supervisor
from llmtune.launch.supervise.outcome import RanksFailedError
from llmtune.plan.prepared_data import PreparedData
from llmtune.plan.steps import StepsPlan
from llmtune.run import fallback
from llmtune.run.attempt import RunInputs, RunTarget
from llmtune.run.fallback import FallbackRunner
from llmtune.storage import layout
from llmtune.storage.atomic import read_json
from llmtune.storage.plain_fields import from_plain
from llmtune.storage.rank_files import RestartRecord
from llmtune.task.labels import Labels
from llmtune.track.console import Console
from llmtune.train.run_folder import RunFolder
from tests.launch.fakes import run_fakes


def failure(step: int, rollback: bool = False) -> RanksFailedError:
    return RanksFailedError(
        "rank 1 ended with signal SIGKILL; see log", "rank 1 ended", step, rollback
    )


#: A run of 6 steps that saves after each second one; ``incident`` is what happens in it.
RUN = """
    resumed = int(os.environ["RESUMED"])
    def meet_at(step):
        (failures / f"{{step}}-{{rank}}").touch()
        while not (failures / f"{{step}}-{{1 - rank}}").exists():
            time.sleep(0.001)
    for step in range(resumed + 1, 7):
        reach(step)
        {incident}
        meet_at(step)
        if step % 2 == 0 and rank == 0:
            reach(step, "save")
            (out / f"checkpoint-{{step}}").mkdir(exist_ok=True)
            (out / f"checkpoint-{{step}}" / "COMPLETE").touch()
"""
KILLED_AT_5 = "if step == 5 and rank == 1 and resumed < 4: os.kill(os.getpid(), signal.SIGKILL)"


class FakeRun:
    """``FallbackRunner`` over fake ranks: plan and data are left out, processes, signals and
    checkpoints are real.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        self.config = Config(report=ReportConfig(write=False))
        self.printed = io.StringIO()
        self.resumed: list[str | None] = []
        self.wanted: list[str] = []
        self._setenv = monkeypatch.setenv
        monkeypatch.setenv("OUT", str(folder))
        monkeypatch.setattr(restarts_module, "FIRST_WAIT_SECONDS", 0.01)
        monkeypatch.setattr(supervisor, "GRACE_SECONDS", 0.5)
        monkeypatch.setattr(fallback, "plan_candidate", lambda *_: None)
        monkeypatch.setattr(fallback, "place_swap", lambda *_: None)
        monkeypatch.setattr(fallback, "describe", lambda _: {})
        monkeypatch.setattr(fallback, "attempt", self._request)
        monkeypatch.setattr(RunInputs, "find_checkpoint", lambda *given: self._find_newest(*given))
        monkeypatch.setattr(fallback, "run_request", lambda request, *_: self.attempt(request))
        self.attempt: Callable[[Any], None] = lambda _: None

    def _prepare(self, composed: Composed, _plan: Any, target: RunTarget, *_: Any) -> RunInputs:
        return RunInputs(
            config=composed.config,
            overrides=[],
            target=target,
            folder=RunFolder(self.folder),
            run_id="a",
            model_folder=self.folder,
            data=from_plain(PreparedData, {}),
            labels=Labels(),
            steps=from_plain(StepsPlan, {}),
            resume_from=None,
        )

    def _find_newest(self, _inputs: RunInputs, _console: Console) -> Path | None:
        """These checkpoints are empty."""
        found = find_checkpoints(self.folder)
        return found[-1] if found else None

    def _request(self, inputs: RunInputs, _plan: Any, resume_from: Path | None, *_: Any) -> Any:
        self.wanted.append(inputs.config.resume_from_checkpoint)
        self.resumed.append(resume_from.name if resume_from else None)
        return SimpleNamespace(resume_from=resume_from)

    def ranks(self, incident: str) -> None:
        """Attempts are real processes."""

        def attempt(request: Any) -> None:
            self._setenv(
                "RESUMED", request.resume_from.name.split("-")[1] if request.resume_from else "0"
            )
            run_fakes(RUN.format(incident=incident), self.folder)

        self.attempt = attempt

    def go(self) -> bool:
        ladder: Any = SimpleNamespace(chosen="top")
        composed = Composed(config=self.config, choices={}, overrides=[], unnamed=frozenset())
        target = RunTarget("run", self.folder)
        return FallbackRunner(
            composed=composed,
            ladder=ladder,
            target=target,
            folder=RunFolder(self.folder),
            console=Console(self.printed),
            prepare=self._prepare,
        ).run()

    @property
    def records(self) -> list[RestartRecord]:
        return RestartRecord.read_all(self.folder)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    return FakeRun(tmp_path, monkeypatch)


@pytest.mark.process
def test_a_killed_rank_costs_the_steps_since_the_newest_checkpoint(fake: FakeRun) -> None:
    fake.ranks(KILLED_AT_5)
    assert fake.go()
    assert fake.resumed == [None, "checkpoint-4"]
    said = (
        "rank 1 ended with signal SIGKILL (killed by another process, not by the kernel's OOM"
        " killer); "
    )
    assert (
        said + "starting again from checkpoint-4 (restart 1 of 3) in 0.01 s"
        in fake.printed.getvalue()
    )
    (record,) = fake.records
    assert record.time > 1.7e9
    assert replace(record, time=0.0) == RestartRecord(
        time=0.0, reason=said.removesuffix("; "), step=4, resumed_from="checkpoint-4"
    )


@pytest.mark.process
def test_a_run_that_does_not_get_on_is_given_up(fake: FakeRun) -> None:
    fake.ranks("if step == 5 and rank == 1: os._exit(9)")
    with pytest.raises(
        LlmtuneError, match="rank 1 ended with exit code 9.*\nNot started again: it failed twice"
    ):
        fake.go()
    assert fake.resumed == [None, "checkpoint-4", "checkpoint-4"]
    assert len(fake.records) == 2


@pytest.mark.process
def test_errors_with_advice_are_not_tried_again(fake: FakeRun) -> None:
    fake.ranks("if step == 5: fail(DataError('rows.jsonl:3: bad'))")
    with pytest.raises(LlmtuneError, match="rows.jsonl:3"):
        fake.go()
    assert fake.resumed == [None]
    assert not (fake.folder / layout.RESTARTS).exists()


@pytest.mark.process
def test_a_start_that_was_told_where_to_begin_goes_on_from_its_own_work(fake: FakeRun) -> None:
    fake.config.resume_from_checkpoint = "none"
    fake.ranks(KILLED_AT_5)
    assert fake.go()
    assert fake.wanted == ["none", "auto"]
    assert fake.config.resume_from_checkpoint == "none"


def test_a_rollback_starts_again_at_once(fake: FakeRun) -> None:
    fake.config.launch.max_restarts = 0
    failures = [failure(3, rollback=True), failure(3, rollback=True)]

    def attempt(_: Any) -> None:
        if failures:
            raise failures.pop()

    fake.attempt = attempt
    assert fake.go()
    assert [record.rollback for record in fake.records] == [True, True]
    assert "rank 1 ended; starting again from the beginning\n" in fake.printed.getvalue()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_wait(
    number: int, fake: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts_module, "FIRST_WAIT_SECONDS", 60)
    before = signal.getsignal(number)

    def attempt(_: Any) -> None:
        threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
        raise failure(3)

    fake.attempt = attempt
    started = time.monotonic()
    with pytest.raises(StoppedError, match="between two attempts"):
        fake.go()
    assert time.monotonic() - started < 10
    assert signal.getsignal(number) is before
    assert read_json(fake.folder / layout.ENDED)["outcome"] == "stopped"


def test_what_a_new_start_finds_wrong_ends_the_run(fake: FakeRun) -> None:
    def attempt(_: Any) -> None:
        raise CheckpointError("damaged")

    fake.attempt = attempt
    with pytest.raises(CheckpointError):
        fake.go()
    end = read_json(fake.folder / layout.ENDED)
    assert (end["outcome"], end["message"]) == ("failed", "damaged")
