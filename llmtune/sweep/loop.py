"""The loop of a sweep: begin a trial, run it, store how it ended, until there are enough."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from llmtune.errors import ERRORS_BY_CODE, LlmtuneError, StoppedError
from llmtune.launch.supervise.signals import StopRequests
from llmtune.sweep.runner import Judge
from llmtune.sweep.space import show
from llmtune.sweep.study import Study
from llmtune.sweep.trial import Trial, TrialEnd, TrialState
from llmtune.units import counted

#: Trials in a row that fail with the same error before the sweep ends.
MOST_FAILURES = 3


class RunsTrials(Protocol):
    """Runs a trial; in tests without a training."""

    def run(self, trial: Trial, judge: Judge, /) -> TrialEnd:
        """Run a trial until it has ended, or a signal has stopped it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The length of a sweep."""

    trials: int
    """Trials in all, over all starts."""
    seconds: float | None
    """Time after which this start begins no further trial."""
    command: str
    """The command line that goes on, for messages."""


class SweepLoop:
    """Runs trials one after the other."""

    def __init__(
        self,
        study: Study,
        runner: RunsTrials,
        limits: Limits,
        stops: StopRequests,
        say: Callable[[str], None],
    ):
        self._study = study
        self._runner = runner
        self._limits = limits
        self._stops = stops
        self._say = say
        self._failures: list[tuple[int, str]] = []

    def run(self, refresh: Callable[[], None] = lambda: None) -> None:
        """Run trials until the sweep has as many as it should.

        Args:
            refresh: Called after every trial.

        Raises:
            StoppedError: A signal came, or the trial was stopped; the same command goes on.
            LlmtuneError: Trials in a row have failed with the same error, whose exit code it has.
        """
        began = time.monotonic()
        while True:
            self._check_stops()
            trial = self._study.find_unfinished()
            if trial is not None:
                self._say(f"trial {trial.number} goes on: {_describe(trial)}")
            elif (trial := self._begin(began)) is None:
                return
            end = self._runner.run(trial, self._judge_of(trial))
            if end.state is TrialState.unfinished:
                self._stop()
            self._store(trial, end)
            refresh()
            self._check_failures(end)

    def _begin(self, began: float) -> Trial | None:
        """Begin the next trial; None where the sweep is over, or its time is."""
        limits, done = self._limits, len(self._study.list_trials())
        if done >= limits.trials:
            return None
        if limits.seconds is not None and time.monotonic() - began > limits.seconds:
            self._say(
                f"hparams_search.timeout is over after {counted(done, 'trial')} of"
                f" {limits.trials}; this command goes on: {limits.command}"
            )
            return None
        trial = self._study.begin()
        if trial is None:
            self._say(f"all {counted(done, 'setting')} of hparams_search.space have been tried")
        else:
            self._say(f"trial {trial.number} ({done + 1} of {limits.trials}): {_describe(trial)}")
        return trial

    def _judge_of(self, trial: Trial) -> Judge:
        return lambda step, value: self._study.judge(trial, step, value)

    def _store(self, trial: Trial, end: TrialEnd) -> None:
        if end.state is TrialState.finished:
            assert end.value is not None
            self._study.finish(trial, end.value)
            self._say(f"trial {trial.number}: {self._study.objective.metric} {end.value:.6g}")
        elif end.state is TrialState.pruned:
            self._study.prune(trial)
            self._say(
                f"trial {trial.number} was ended early: at its last evaluation it was worse than"
                " the median of the others (hparams_search.pruner=none trains all to the end)"
            )
        else:
            self._study.fail(trial, end.reason)
            how = "is not started" if end.does_not_fit else "failed"
            self._say(f"trial {trial.number} {how}: {end.reason}")

    def _check_stops(self) -> None:
        if self._stops.received:
            self._stop()

    def _stop(self) -> None:
        raise StoppedError(f"the sweep is stopped; this command goes on: {self._limits.command}")

    def _check_failures(self, end: TrialEnd) -> None:
        """End the sweep where the same error comes again and again."""
        if end.does_not_fit:
            # It costs seconds, and other settings may fit.
            return
        if end.state is not TrialState.failed:
            self._failures.clear()
            return
        # Steps, losses and folders differ from trial to trial.
        self._failures.append((end.exit_code, re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", end.reason)))
        newest = self._failures[-MOST_FAILURES:]
        if len(newest) == MOST_FAILURES and len(set(newest)) == 1:
            kind = ERRORS_BY_CODE.get(end.exit_code, LlmtuneError)
            raise kind(
                f"{MOST_FAILURES} trials in a row failed with the same error, and the sweep ends:"
                f" {end.reason}\nCorrect that; further trials: {self._limits.command}"
            )


def _describe(trial: Trial) -> str:
    return " ".join(f"{key}={show(value)}" for key, value in trial.values.items())
