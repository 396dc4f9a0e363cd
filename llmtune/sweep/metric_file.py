"""Follow the evaluations in the ``metrics.jsonl`` of a run that trains in another process."""

from __future__ import annotations

from pathlib import Path

from llmtune.storage.plain_json import parse_lines

Evaluation = tuple[int, float]
"""Optimizer step, and the metric; NaN where it was not finite."""


class MetricFile:
    """Reads what was appended since the last look.

    A run that starts again writes the file anew, without what it is going to do again. It is then
    read from its beginning.
    """

    def __init__(self, path: Path, metric: str):
        self._path = path
        self._metric = metric
        self._inode = 0
        self._offset = 0

    def read_new(self) -> list[Evaluation]:
        """Return the evaluations since the last call, in order; none of step 0."""
        try:
            with self._path.open("rb") as file:
                status = self._path.stat()
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        # A line that is still being written is read the next time.
        end = data.rfind(b"\n") + 1
        self._offset += end
        found = []
        for record in parse_lines(data[:end].decode(errors="replace")):
            step = record.get("step")
            if self._metric in record and type(step) is int and step > 0:
                value = record[self._metric]
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                found.append((step, float(value) if is_number else float("nan")))
        return found
