"""The page of a sweep: its trials, the best one, which keys mattered, and pictures of them."""

from __future__ import annotations

import time
from pathlib import Path

from llmtune.report.charts import draw_bars
from llmtune.report.page import Block, Code, Page, Section, Table, Text
from llmtune.report.run_page import format_clock
from llmtune.report.write import write_page
from llmtune.storage import layout
from llmtune.sweep.charts import draw_history, draw_parallel, list_axes
from llmtune.sweep.results import SweepResults
from llmtune.sweep.trial import TrialState
from llmtune.units import counted, format_seconds


def build_sweep_page(results: SweepResults) -> Page:
    """Build the page of a sweep."""
    sections = [
        Section(name="best", title="The best trial", blocks=_best(results)),
        Section(name="importance", title="Which keys mattered", blocks=_importance(results)),
        Section(name="pictures", title="Trials in pictures", blocks=_pictures(results)),
        Section(name="trials", title="Trials", blocks=_trials(results)),
        Section(name="space", title="What was searched", blocks=_space(results)),
    ]
    return Page(
        title=f"Sweep {results.folder.resolve().name}",
        state=results.state,
        summary=_summary(results),
        sections=[section for section in sections if section.blocks],
        written=f"Written by llmtune on {format_clock(time.time())}.",
    )


def write_sweep_page(results: SweepResults, cache: Path) -> Path:
    """Write ``report.html`` into the sweep's folder.

    Raises:
        CheckpointError: It cannot be written.
        ImportError: What draws is not installed.
    """
    file = results.folder / layout.REPORT
    write_page(build_sweep_page(results), file, cache)
    return file


def _summary(results: SweepResults) -> list[tuple[str, str]]:
    states = [trial.state for trial in results.trials]
    # A later start may ask for fewer than there are.
    asked = max(results.asked, len(states))
    rows = [("goal", results.objective.goal), ("trials", f"{len(states)} of {asked}")]
    ended = (TrialState.finished, TrialState.pruned, TrialState.failed)
    rows += [(state.value, str(states.count(state))) for state in ended if state in states]
    if results.best is not None:
        rows.append((f"best {results.objective.metric}", f"{results.best.value:.6g}"))
    if seconds := sum(trial.seconds for trial in results.trials):
        rows.append(("in trials", format_seconds(seconds)))
    return rows


def _best(results: SweepResults) -> list[Block]:
    best = results.best
    if best is None:
        return [Text("No trial has finished yet.")]
    return [
        Text(
            f"Trial {best.number} has {results.objective.metric} {best.value:.6g}. Its run folder"
            f" is {results.run_folder(best)}. This trains with its settings in another folder,"
            " where they can also be changed, such as the length of the run:"
        ),
        Code(results.best_command),
    ]


def _importance(results: SweepResults) -> list[Block]:
    if not results.importance:
        return [Text("Too few trials have finished to tell which keys mattered.")]
    finished = sum(trial.state is TrialState.finished for trial in results.trials)
    bars = list(results.importance.items())
    return [
        draw_bars("importance", "Share of each key", "share", bars),
        Text(
            "The shares are those of PED-ANOVA, which compares the settings of the best trials with"
            f" those of all {counted(finished, 'finished trial')}. Few trials tell little."
        ),
    ]


def _pictures(results: SweepResults) -> list[Block]:
    objective = results.objective
    finished = [trial for trial in results.trials if trial.state is TrialState.finished]
    blocks: list[Block] = []
    if finished:
        axes = list_axes(results.space, objective, finished)
        blocks.append(draw_parallel("parallel", "Settings", axes, objective, finished))
    if any(trial.value is not None for trial in results.trials):
        blocks.append(draw_history("history", "Trial by trial", objective, results.trials))
    return blocks


def _trials(results: SweepResults) -> list[Block]:
    if not results.trials:
        return []
    head = [*results.head, "time", "reason"]
    rows = [
        [*results.row(trial), format_seconds(trial.seconds), trial.reason]
        for trial in results.trials
    ]
    return [Table(caption="Every trial, in order", head=head, rows=rows)]


def _space(results: SweepResults) -> list[Block]:
    rows = [[parameter.key, parameter.describe()] for parameter in results.space]
    return [Table(caption="Searched keys", head=["key", "values"], rows=rows)]
