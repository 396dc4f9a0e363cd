"""Compare a sweep with the one that its folder was begun with.

A record has the ``goal``, the ``space`` by key, and the ``settings`` of the trials by dotted key,
those alone that change a result. These must not change; ``trials`` and ``command`` may.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmtune.errors import CheckpointError
from llmtune.report.settings_table import show
from llmtune.sweep.space import PREFIX


def find_record_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Find what differs from the sweep that a folder was begun with, in words."""
    found = []
    if before["goal"] != now["goal"]:
        found.append(f"hparams_search.metric: {before['goal']} there, {now['goal']} now")
    for name, prefix in (("space", f"{PREFIX}."), ("settings", "")):
        old, new = before[name], now[name]
        for key in sorted(old.keys() | new.keys()):
            there, here = (show(values[key]) if key in values else "-" for values in (old, new))
            if there != here:
                found.append(f"{prefix}{key}: {there} there, {here} now")
    return found


def check_record(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with another search, or with trials of another job.

    Raises:
        CheckpointError: With what differs.
    """
    if changes := find_record_changes(before, now):
        raise CheckpointError(
            f"{folder} holds another sweep:\n"
            + "\n".join(f"  {change}" for change in changes)
            + "\nTake the old values, or another output_dir="
        )
