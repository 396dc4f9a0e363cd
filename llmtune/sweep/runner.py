"""Run one trial: ask the plan, train in a run folder, read what came out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from llmtune.checkpoint.find import find_checkpoints, remove_checkpoint
from llmtune.errors import EXIT_DONE, EXIT_UNEXPECTED, CheckpointError, DoesNotFitError
from llmtune.launch.supervise.child_command import ChildEnd, run_child
from llmtune.launch.supervise.signals import StopRequests
from llmtune.plan.run_record import RunRecord
from llmtune.security.redaction import redact
from llmtune.storage import layout
from llmtune.storage.plain_json import parse_json
from llmtune.storage.rank_files import FinishedRecord
from llmtune.sweep.metric_file import MetricFile
from llmtune.sweep.space import to_overrides
from llmtune.sweep.trial import Trial, TrialEnd, TrialState
from llmtune.track.console import Console
from llmtune.track.metrics import read_metrics
from llmtune.track.status import Status

#: Whether a trial should be ended early, after an evaluation at an optimizer step.
Judge = Callable[[int, float], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialCommand:
    """The command line of every trial of a sweep, but for its settings and its folder."""

    overrides: list[str]
    plan_overrides: list[str]
    """Further ones for the plan: the data, where nobody has named any."""
    default_overrides: list[str] = field(default_factory=list)
    """Overrides of trials alone, such as ``export=none``: a run of its own exports its model."""
    config_dir: str | None
    name: str
    """Name of the sweep, which is the first part of the names of its runs."""

    @property
    def options(self) -> list[str]:
        """The options of every command."""
        return ["--config-dir", self.config_dir] if self.config_dir else []

    def describe(self, trial: Trial) -> list[str]:
        """Return the arguments that train with the settings of a trial, in a folder of its own."""
        overrides = [*self.overrides, *self.default_overrides]
        return ["train", *self.options, *overrides, *to_overrides(trial.values)]

    def describe_again(self, trial: Trial) -> list[str]:
        """Return the arguments of a run of its own with the settings of a trial."""
        return ["train", *self.options, *self.overrides, *to_overrides(trial.values)]


class TrialRunner:
    """Runs the trials of a sweep, one at a time."""

    def __init__(
        self,
        folder: Path,
        command: TrialCommand,
        metric: str,
        stops: StopRequests,
        console: Console,
    ):
        """
        Args:
            folder: The sweep's.
            metric: A key of evaluation lines.
            stops: The signals that the sweep has received.
            console: Shows what is done meanwhile.
        """
        self._console = console
        self._folder = folder
        self._command = command
        self._metric = metric
        self._stops = stops

    def run(self, trial: Trial, judge: Judge) -> TrialEnd:
        """Run a trial until it has ended, or a signal has stopped it.

        A trial whose run has begun goes on where it was.
        """
        run = layout.trial_folder(self._folder, trial.number)
        if not (run / layout.PLAN).is_file():
            refused = self._ask_plan(trial)
            if refused is not None:
                return refused
        overrides = [
            *self._command.describe(trial),
            f"output_dir={run}",
            f"run_name={self._command.name}-{run.name}",
        ]
        _check_own(run, trial)
        watch = _Watch(run, self._metric, judge)
        # What an earlier start of it wrote, before anything is started.
        watch.look()
        if watch.is_pruned:
            remove_checkpoints(run)
            return TrialEnd(state=TrialState.pruned)
        end = run_child(overrides, self._stops, watch.look)
        return self._read_end(run, end, watch)

    def _ask_plan(self, trial: Trial) -> TrialEnd | None:
        """Return the end of a trial that the plan refuses; None for one that can begin."""
        _, *arguments = self._command.describe(trial)
        command = ["plan", "--json", *arguments, *self._command.plan_overrides]
        with Status(self._console, f"planning trial {trial.number}"):
            end = run_child(command, self._stops, is_quiet=True)
        if end.exit_code == EXIT_DONE:
            return None
        if self._stops.received or end.is_stopped:
            return TrialEnd(state=TrialState.unfinished)
        if end.exit_code == DoesNotFitError.exit_code:
            return TrialEnd(
                state=TrialState.failed,
                reason=_read_misfit(end) or "it does not fit",
                exit_code=end.exit_code,
                does_not_fit=True,
            )
        return _failure(end)

    def _read_end(self, run: Path, end: ChildEnd, watch: _Watch) -> TrialEnd:
        """Find out how a training has ended, and the value that it reached."""
        watch.look()
        if end.exit_code == EXIT_DONE:
            value, lacks = _read_value(run, self._metric)
            if value is None:
                return TrialEnd(state=TrialState.failed, reason=lacks, exit_code=EXIT_UNEXPECTED)
            return TrialEnd(state=TrialState.finished, value=value)
        if self._stops.received:
            # Whatever else went wrong while it was stopped goes wrong again, or not.
            return TrialEnd(state=TrialState.unfinished)
        if end.is_stopped and watch.is_pruned:
            remove_checkpoints(run)
            return TrialEnd(state=TrialState.pruned)
        if end.is_stopped:
            return TrialEnd(state=TrialState.unfinished)
        return _failure(end)


def _check_own(run: Path, trial: Trial) -> None:
    """Refuse a folder that another trial has begun, before anything in it is judged or removed.

    Raises:
        CheckpointError: Its settings are not those of this trial.
    """
    file = run / layout.OVERRIDES
    if not file.is_file():
        return
    stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    lacks = [text for text in to_overrides(trial.values) if redact(text) not in (stored or [])]
    if lacks:
        raise CheckpointError(
            f"{run} holds a run without {lacks[0]}, which is not this sweep's trial"
            f" {trial.number}; move it away, or take another output_dir="
        )


class _Watch:
    """Judges the evaluations of a run, until one says that it should end early."""

    def __init__(self, run: Path, metric: str, judge: Judge):
        self._run = run
        self._file = MetricFile(run / layout.METRICS, metric)
        self._judge = judge
        self.is_pruned = False

    def look(self) -> bool:
        """Judge what is new; tell whether the run should end."""
        for step, value in self._file.read_new():
            is_bad = self._judge(step, value)
            # The last evaluation has nothing left to save.
            self.is_pruned = self.is_pruned or (is_bad and step < self._total_steps())
        return self.is_pruned

    def _total_steps(self) -> float:
        try:
            record = RunRecord.from_json((self._run / layout.PLAN).read_bytes())
        except (OSError, ValueError):
            return math.inf
        return record.steps.total_steps if record.steps is not None else math.inf


def remove_checkpoints(run: Path) -> None:
    """Remove the checkpoints of a pruned trial, which nothing goes on from."""
    for checkpoint in find_checkpoints(run):
        remove_checkpoint(checkpoint)


def _failure(end: ChildEnd) -> TrialEnd:
    number = end.exit_code
    ended = f"ended by signal {-number}" if number < 0 else f"ended with code {number}"
    return TrialEnd(
        state=TrialState.failed, reason=end.error or ended, exit_code=max(number, EXIT_UNEXPECTED)
    )


def _read_misfit(end: ChildEnd) -> str:
    try:
        plan = parse_json(end.out)
    except ValueError:
        return end.error
    return str(plan.get("message", "")) if isinstance(plan, dict) else end.error


def _read_value(run: Path, metric: str) -> tuple[float | None, str]:
    """Read the metric of the model that a finished run has published.

    Returns:
        The value, and why there is none.
    """
    finished = FinishedRecord.read(run)
    if finished is None:
        return None, f"its folder has no {layout.FINISHED}"
    best = finished.best if finished.loaded_best else None
    if best is not None and best.get("metric") == metric:
        reached = float(best["value"])
        return (reached, "") if math.isfinite(reached) else (None, f"{metric} is not finite")
    records = [record for record in read_metrics(run / layout.METRICS) if "eval_loss" in record]
    if not records:
        return None, "it has no evaluation"
    newest = records[-1]
    value = newest.get(metric)
    if value is None:
        there = ", ".join(key for key in newest if key.startswith("eval_"))
        lacks = "is not finite" if metric in newest else f"is not in its evaluations ({there})"
        return None, f"{metric} {lacks}"
    return float(value), ""
