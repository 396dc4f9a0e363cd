"""``runs``: list run folders; remove checkpoints of finished ones, or of the cache, when asked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llmtune.checkpoint.finished_runs import find_removable, prune_finished
from llmtune.cli.arguments import Options
from llmtune.cli.folders.columns import align
from llmtune.cli.output import stdout_for_us
from llmtune.config.cache_folder import INSTEAD, KEY, locate_cache
from llmtune.config.composed import Composed
from llmtune.config.groups.paths import PathsConfig
from llmtune.config.groups.verbs.runs import Prune, RunsConfig
from llmtune.errors import EXIT_DONE, CheckpointError, ConfigError
from llmtune.report.run_list import RunEntry, list_runs
from llmtune.security.terminal import to_json_line
from llmtune.security.trust import require_own
from llmtune.storage.unused_cache import find_unused, remove_entry
from llmtune.track.console import Console
from llmtune.track.status import Status
from llmtune.units import counted, format_bytes, format_seconds, some

#: Where runs are without ``output_dir``.
_DEFAULT = "runs"
_DAY_SECONDS = 86400.0


def run(composed: Composed, options: Options) -> int:
    """Print a line per run, and what was removed.

    Raises:
        ConfigError: More than one folder is named, or it is none.
    """
    if len(options.folders) > 1:
        raise ConfigError(
            f"runs takes one folder with run folders in it, not {', '.join(options.folders)}"
        )
    folder = Path(options.folders[0] if options.folders else _DEFAULT).expanduser()
    settings = composed.config.runs
    with Status(Console(sys.stderr), "reading the run folders"):
        entries = list_runs(folder)
        if settings.prune is Prune.cache:
            pruned = _prune_cache(entries, settings, composed.config.paths)
        else:
            pruned = _prune(entries, settings)
    with stdout_for_us() as write:
        if options.as_json:
            values: dict[str, Any] = {"runs": [entry.to_dict() for entry in entries]}
            if settings.prune is not Prune.nothing:
                values |= {"pruned": pruned, "dry_run": settings.dry_run}
            write(to_json_line(values, letters=True) + "\n")
            return EXIT_DONE
        if not entries:
            write(f"no run folder in {folder}\n")
        else:
            head = ["run", "state", "step", "loss", "held-out", "size", "age"]
            write("".join(f"{line}\n" for line in align(head, [_to_row(e) for e in entries])))
        if settings.prune is not Prune.nothing:
            write("".join(f"{line}\n" for line in _describe(pruned, settings)))
    return EXIT_DONE


def _to_row(entry: RunEntry) -> list[str]:
    step = f"{entry.step:,}" + (f"/{entry.total_steps:,}" if entry.total_steps else "")
    losses = ("-" if loss is None else f"{loss:.4f}" for loss in (entry.loss, entry.eval_loss))
    size, age = format_bytes(entry.size_bytes), _describe_age(entry.age_seconds)
    return [str(entry.folder), entry.state, step, *losses, size, age]


def _describe_age(seconds: float) -> str:
    if seconds >= _DAY_SECONDS:
        return counted(int(seconds / _DAY_SECONDS), "day")
    return format_seconds(seconds)


def _prune(entries: list[RunEntry], settings: RunsConfig) -> list[dict[str, Any]]:
    """Remove what is asked for from finished runs, or find out what would be."""
    if settings.prune is not Prune.checkpoints:
        return []
    pruned = []
    for entry in entries:
        if entry.state != "finished":
            continue
        try:
            found = (
                find_removable(entry.folder) if settings.dry_run else prune_finished(entry.folder)
            )
        except CheckpointError:
            # A run has begun in it since it was listed.
            continue
        pruned += [{"folder": str(item.folder), "bytes": item.freed_bytes} for item in found]
    return pruned


def _prune_cache(
    entries: list[RunEntry], settings: RunsConfig, paths: PathsConfig
) -> list[dict[str, Any]]:
    """Remove what nobody has used for a while from the cache, or find out what that would be.

    Raises:
        ConfigError: A run may be about to open what it has found there.
        MissingPrerequisiteError: The cache is another user's.
    """
    running = [str(entry.folder) for entry in entries if entry.state == "running"]
    if running and not settings.dry_run:
        raise ConfigError(
            f"runs.prune=cache: {some(running)} may need what is in the cache; wait for the end, or"
            " take runs.dry_run=true"
        )
    cache = locate_cache(paths)
    if not cache.is_dir():
        return []
    require_own(cache, KEY, INSTEAD)
    unused = find_unused(cache, settings.unused_days * _DAY_SECONDS)
    if not settings.dry_run:
        for entry in unused:
            remove_entry(entry)
    return [{"folder": str(entry.path), "bytes": entry.nbytes} for entry in unused]


def _describe(pruned: list[dict[str, Any]], settings: RunsConfig) -> list[str]:
    would = "would remove" if settings.dry_run else "removed"
    if not pruned and settings.prune is Prune.cache:
        return [f"all of the cache was used in the last {counted(settings.unused_days, 'day')}"]
    if not pruned:
        return ["no finished run has a checkpoint that it does not need"]
    freed = format_bytes(sum(item["bytes"] for item in pruned))
    verb = "would free" if settings.dry_run else "freed"
    lines = [f"{would} {item['folder']}  {format_bytes(item['bytes'])}" for item in pruned]
    noun = "checkpoint" if settings.prune is Prune.checkpoints else "part"
    return [*lines, f"{counted(len(pruned), noun)}: {verb} {freed}"]
