"""Write and read ``metrics.jsonl``: one object per line, numbers unrounded."""

import json
import math
from pathlib import Path
from typing import Any

from llmtune.errors import CheckpointError
from llmtune.storage.atomic import write_atomically
from llmtune.storage.plain_json import parse_lines
from llmtune.track.tracker import Outcome, Record


class MetricsFile:
    """Appends records; each line is handed to the kernel before the next step begins.

    JSON has no infinity: a loss or norm that is not finite is written as null.
    """

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def log(self, record: Record) -> None:
        """Append a line.

        Raises:
            CheckpointError: The disk refused.
        """
        finite = {key: value if _is_finite(value) else None for key, value in record.items()}
        try:
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            # Unlike other trackers it is not dropped: every step has a line, or the run ends.
            raise CheckpointError(
                f"{self._file.name} cannot be written: {error.strerror}"
            ) from error

    def finish(self, _outcome: Outcome) -> None:
        """Close the file."""
        self._file.close()


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def read_metrics(path: Path) -> list[Record]:
    """Read the records; a half-written line, as a crash leaves it, is skipped."""
    if not path.is_file():
        return []
    return [record for record in parse_lines(path.read_text(encoding="utf-8")) if "step" in record]


def cut_metrics(path: Path, step: int) -> None:
    """Remove the lines after ``step``, from which the run resumes, and half-written ones.

    Raises:
        OSError: The disk refused; the file is unchanged.
    """
    if not path.is_file():
        return
    kept = "".join(
        json.dumps(record) + "\n" for record in read_metrics(path) if record["step"] <= step
    )
    write_atomically(path, kept)
