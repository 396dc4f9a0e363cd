"""``metrics.jsonl``: one object a line, numbers unrounded, never a line beyond the step that the
run stands at.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from llmtune.errors import CheckpointError
from llmtune.storage.atomic import write_atomically
from llmtune.storage.plain_json import parse_json
from llmtune.track.tracker import Record


class MetricsFile:
    """Appends records; each line is on its way to the disk before the next step begins.

    JSON has no infinity: a loss or norm that is not finite is null.
    """

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def log(self, record: Record) -> None:
        """One line."""
        finite = {key: value if _is_finite(value) else None for key, value in record.items()}
        try:
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            # Not left out like other trackers: every step has a line, or the run ends.
            raise CheckpointError(
                f"{self._file.name} cannot be written: {error.strerror}"
            ) from error

    def finish(self) -> None:
        """Close."""
        self._file.close()


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def read_metrics(path: Path) -> list[Record]:
    """Every whole line; a half-written one, as a crash leaves it, is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def cut_metrics(path: Path, step: int) -> None:
    """Drop half-written lines, and what lies beyond ``step`` because its checkpoint was never
    written.
    """
    if not path.is_file():
        return
    kept = "".join(
        json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= step
    )
    write_atomically(path, kept)
