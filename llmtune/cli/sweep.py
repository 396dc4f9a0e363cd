"""``sweep``: train with many settings, one run folder each, and name the best."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from llmtune.cli.arguments import Options
from llmtune.cli.folders.columns import align
from llmtune.cli.output import stdout_for_us
from llmtune.config.cache_folder import find_cache
from llmtune.config.composed import Composed
from llmtune.errors import (
    EXIT_DONE,
    CheckpointError,
    DoesNotFitError,
    LlmtuneError,
)
from llmtune.launch.supervise.signals import remember_stops
from llmtune.report.script import describe_missing, find_missing
from llmtune.security.terminal import to_json_line
from llmtune.storage import layout
from llmtune.storage.lock import hold_lock
from llmtune.sweep.loop import Limits, SweepLoop
from llmtune.sweep.page import write_sweep_page
from llmtune.sweep.record import check_record
from llmtune.sweep.results import SweepResults, read_results
from llmtune.sweep.runner import TrialRunner
from llmtune.sweep.study import Study, open_study
from llmtune.sweep.trial import TrialState
from llmtune.track.console import Console
from llmtune.track.service import check_packages
from llmtune.track.status import Status
from llmtune.train.run_folder import open_run_folder

if TYPE_CHECKING:
    from llmtune.sweep.settings import SweepSettings


def run(composed: Composed, options: Options) -> int:
    """Run or go on with a sweep, and print its table.

    Raises:
        ConfigError: The search or the job of its trials cannot work.
        MissingPrerequisiteError: The package of a tracker is not there.
        CheckpointError: The folder holds something else, or another sweep uses it.
        StoppedError: A signal came; the same command goes on.
        LlmtuneError: Trials fail with the same error, or none has a value.
    """
    with contextlib.ExitStack() as stack:
        # What trials print goes to standard error where standard output is for one JSON object.
        write = stack.enter_context(stdout_for_us()) if options.as_json else sys.stdout.write
        console = Console(sys.stderr if options.as_json else sys.stdout)
        with Status(console, "checking the search"):
            from llmtune.sweep.settings import resolve_sweep

            settings = resolve_sweep(composed, options.config_dir)
            # Each trial would end with it, and be used up.
            check_packages(settings.config.tracker)
        _check_folder(settings)
        folder = open_run_folder(settings.folder, console.say).path
        stack.enter_context(hold_lock(folder / layout.LOCK, "output_dir="))
        study = _open_study(settings)
        _run_trials(study, settings, console)

        results = _read(study, settings)
        _write_report(results, settings, console)
        if options.as_json:
            write(to_json_line(results.to_json(), letters=True) + "\n")
        else:
            console.say("\n".join(["", *to_lines(results)]))
    if results.best is None:
        raise _no_value(results)
    return EXIT_DONE


def _check_folder(settings: SweepSettings) -> None:
    """Refuse a folder that holds something else than this sweep.

    Raises:
        CheckpointError: It is a run folder, or holds files of something else.
    """
    folder = settings.folder
    if not folder.is_dir() or (folder / layout.STUDY).is_file():
        return
    others = sorted(entry.name for entry in folder.iterdir() if entry.name[0] != ".")
    if others:
        raise CheckpointError(
            f"output_dir={folder} is not empty and holds no sweep ({', '.join(others[:5])}); take"
            " another output_dir="
        )


def _open_study(settings: SweepSettings) -> Study:
    search = settings.config.hparams_search
    study = open_study(settings.folder, settings.space, settings.objective, search, settings.prunes)
    record = settings.to_record()
    if before := study.read_record():
        check_record(settings.folder, before, record)
    if record != before:
        study.write_record(record)
    return study


def _run_trials(study: Study, settings: SweepSettings, console: Console) -> None:
    search = settings.config.hparams_search
    done = sum(trial.state is not TrialState.unfinished for trial in study.list_trials())
    pruned = "those behind the median are ended early" if settings.prunes else "none is ended early"
    console.page(
        f"sweep of {search.trials} trials in {settings.folder}",
        {
            "goal": f"{settings.objective.goal}; {pruned}",
            **{parameter.key: parameter.describe() for parameter in settings.space},
            **({"done before": str(done)} if done else {}),
        },
    )
    limits = Limits(trials=search.trials, seconds=search.timeout, command=settings.command_line)
    with remember_stops() as stops:
        runner = TrialRunner(
            settings.folder,
            settings.command,
            settings.objective.metric,
            stops=stops,
            console=console,
        )
        loop = SweepLoop(study, runner, limits, stops=stops, say=console.say)
        try:
            loop.run(lambda: _write_report(_read(study, settings), settings, console))
        except LlmtuneError:
            _write_report(_read(study, settings), settings, console)
            raise


def _read(study: Study, settings: SweepSettings) -> SweepResults:
    asked = settings.config.hparams_search.trials
    return read_results(study, settings.folder, asked, settings.command)


def _write_report(results: SweepResults, settings: SweepSettings, console: Console) -> None:
    """Write ``report.html``; a sweep goes on without it."""
    config = settings.config
    if not config.report.write:
        return
    if missing := find_missing():
        console.say(describe_missing(missing))
        return
    try:
        write_sweep_page(results, find_cache(config.paths))
    except CheckpointError as error:
        console.say(str(error))


def to_lines(results: SweepResults) -> list[str]:
    """Return the table of a sweep, its best trial, and which keys mattered."""
    lines = [*align(results.head, [results.row(trial) for trial in results.trials])]
    best = results.best
    if best is not None:
        settings = (f"{key}={results.show_value(best, key)}" for key in best.values)
        lines += [
            "",
            f"best: trial {best.number} with {results.objective.metric} {best.value:.6g}",
            f"  settings  {' '.join(settings)}",
            f"  folder    {results.run_folder(best)}",
            f"  again     {results.best_command}",
        ]
    if results.importance:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in results.importance.items())
        lines.append(f"importance: {shares} (PED-ANOVA)")
    page = results.folder / layout.REPORT
    return [*lines, f"page  {page}"] if page.is_file() else lines


def _no_value(results: SweepResults) -> LlmtuneError:
    """Return the error of a sweep in which no trial has a value."""
    reasons = [trial.reason for trial in results.trials if trial.reason]
    text = f"no trial of {results.folder} has finished"
    if reasons:
        text += f"; the last one failed: {reasons[-1]}"
    # Where nothing was started, nothing fits.
    has_begun = any(results.run_folder(trial).exists() for trial in results.trials)
    nothing_fits = bool(reasons) and not has_begun
    return DoesNotFitError(text) if nothing_fits else LlmtuneError(text)
