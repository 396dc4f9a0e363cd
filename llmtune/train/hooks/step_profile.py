"""Trace some steps with torch's profiler, and say where their time went (``debug=profile``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtune.config.groups.profile import ProfileConfig
from llmtune.engine.distributed import Rank
from llmtune.engine.phases.phase_clock import REST
from llmtune.storage import layout
from llmtune.storage.atomic import write_atomically
from llmtune.track.console import Console
from llmtune.track.profiling.summary import to_markdown, to_rows
from llmtune.track.profiling.trace import MARK, STEP_MARK, TraceShares, measure_trace, read_events
from llmtune.train.training_state import TrainingState
from llmtune.units import counted

if TYPE_CHECKING:
    from llmtune.train.request import RunRequest


class StepProfile:
    """Traces steps of this start on every rank, all the same ones, and sums up those of rank 0.

    A trace of one rank alone would make it the slow one that all others wait for. Steps that are
    not traced cost nothing. The profiler waits for the GPU when it ends, and nowhere else.
    """

    def __init__(self, config: ProfileConfig, request: RunRequest, rank: Rank, console: Console):
        self._config = config
        self._run = request.run_folder
        self._rank = rank
        self._console = console
        self._last_step = request.steps.total_steps
        self._traced = range(0)
        self._profiler: Any = None
        self._open_mark: Any = None
        self._shares: TraceShares | None = None

    def on_start(self, progress: TrainingState) -> None:
        """Choose the steps, of those that this start has left."""
        left = self._last_step - progress.step
        if not self._config.steps or left <= 0:
            return
        # The profiler's own warm-up takes a step too.
        count = min(self._config.steps, max(1, left - 1))
        first = progress.step + 1 + min(self._config.warmup_steps, left - count)
        self._traced = range(first, first + count)
        asked = ProfileConfig(steps=count, warmup_steps=first - progress.step - 1)
        if asked != self._config:
            self._console.say(
                f"profile: {counted(left, 'step')} left: {counted(count, 'step')} traced behind"
                f" {counted(asked.warmup_steps, 'step')} of warm-up, instead of"
                f" profile.steps={self._config.steps} behind"
                f" profile.warmup_steps={self._config.warmup_steps}"
            )

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Trace the step that the block does, if it is one of those."""
        if number == self._traced.start - 1:
            self._prepare()
        if number not in self._traced:
            yield
            return
        if number == self._traced.start:
            self._begin()
        clock = self._rank.phases.clock
        with torch.profiler.record_function(f"{STEP_MARK}{number}"):
            clock.listener = self._mark
            try:
                yield
            finally:
                clock.listener = None
                self._mark(REST)
        if number == self._traced[-1]:
            self._end()

    def on_end(self, progress: TrainingState) -> None:
        """Show the summary; a run that ended early has its last traced steps behind it."""
        if self._profiler is not None and progress.step in self._traced:
            self._end()
        if self._shares is not None:
            title = f"where the time of a step went ({counted(self._shares.steps, 'traced step')})"
            self._console.page(title, to_rows(self._shares))

    def _prepare(self) -> None:
        """Load what the profiler needs, in the step before the first one that counts."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._rank.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities, acc_events=False)
        self._profiler.prepare_trace()

    def _begin(self) -> None:
        if self._profiler is None:
            self._prepare()
        self._profiler.start_trace()

    def _mark(self, phase: str) -> None:
        """End the mark of a phase in the trace, and begin that of the next."""
        if self._open_mark is not None:
            self._open_mark.__exit__(None, None, None)
            self._open_mark = None
        if phase != REST:
            self._open_mark = torch.profiler.record_function(f"{MARK}{phase}")
            self._open_mark.__enter__()

    def _end(self) -> None:
        """Write this rank's trace, and on rank 0 the summary; a full disk ends no run."""
        with self._rank.phases.within("trace"):
            profiler, self._profiler = self._profiler, None
            profiler.stop_trace()
            file = layout.trace_file(self._run, self._rank.rank)
            try:
                file.parent.mkdir(exist_ok=True)
                file.unlink(missing_ok=True)
                profiler.export_chrome_trace(str(file))
                if self._rank.is_first:
                    self._summarize(file)
            except (OSError, ValueError, RuntimeError) as error:
                self._console.say(f"profile: {file} is not written: {error}")

    def _summarize(self, file: Path) -> None:
        self._shares = measure_trace(read_events(file))
        if self._shares is None:
            return
        write_atomically(self._run / layout.PROFILE_SUMMARY, to_markdown(self._shares, file.name))
        self._console.say(
            f"profile: {counted(self._shares.steps, 'step')} traced: {file} (opens in"
            f" https://ui.perfetto.dev), {self._run / layout.PROFILE_SUMMARY}"
        )
