"""The folder of a prediction under way: its rows as tokens, and the results, window by window.

A window is a number of rows that follow each other in the input. Its files are written once, each
under its name only when it is on the disk, so that a command that was killed leaves whole ones.

====================  =============================================================================
``job.json``          what is predicted with what, as a hash: written first
``inputs-N.jsonl``    the fields of each row of window N, and why it is not predicted
``tokens-N.npz``      the tokens of its rows
``prepared.json``     counts (:class:`Prepared`): written when all windows are there
``results-N.jsonl``   what the model says of each of its rows
====================  =============================================================================
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmtune.data.store.token_store import Row
from llmtune.predict.output_row import write_line
from llmtune.storage.atomic import read_json, write_atomically
from llmtune.storage.plain_fields import from_plain
from llmtune.task.labels import UNKNOWN, Tags

_JOB, _PREPARED = "job.json", "prepared.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRow:
    """A row of the input, ready for the model."""

    fields: dict[str, Any]
    ids: Sequence[int] = ()
    """Token ids; none of a row that is not predicted."""
    mask: Sequence[bool] = ()
    """Marked tokens, as the mask of ``Row`` has them."""
    words: int = 0
    """Words of a row that is judged word by word."""
    plain: bool = True
    """No chat template was used."""
    error: str | None = None
    """Reason why it is not predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Counts of the prepared rows."""

    rows: int
    windows: int
    skipped: int
    """Rows that are not predicted."""
    truncated: int
    """Rows that were cut to ``data.max_seq_length``."""


@dataclass(frozen=True, slots=True)
class WindowRow:
    """A row of a window, as the model takes it."""

    row: Row
    plain: bool


class JobFolder:
    """The folder of one prediction."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def job(self) -> str | None:
        """The hash of the job that the folder belongs to; None where none has begun."""
        return (read_json(self.path / _JOB) or {}).get("job")

    @property
    def prepared(self) -> Prepared | None:
        """The counts of the rows, once all are prepared."""
        values = read_json(self.path / _PREPARED)
        return from_plain(Prepared, values) if values else None

    def begin(self, job: str) -> None:
        """Note whose folder it is."""
        if self.job != job:
            write_atomically(self.path / _JOB, json.dumps({"job": job}))

    def write_prepared(self, prepared: Prepared) -> None:
        """Note that all rows are prepared."""
        write_atomically(self.path / _PREPARED, json.dumps(asdict(prepared)))

    def write_window(self, window: int, rows: Sequence[PreparedRow]) -> None:
        """Write the rows of a window."""
        lines = [write_line({"fields": row.fields, "error": row.error}) for row in rows]
        write_atomically(self._file("inputs", window, "jsonl"), "".join(lines))
        tokens = io.BytesIO()
        np.savez(
            tokens,
            ids=np.concatenate([np.asarray(row.ids, dtype=np.int32) for row in rows]),
            mask=np.concatenate([np.asarray(row.mask, dtype=np.bool_) for row in rows]),
            lengths=np.array([len(row.ids) for row in rows], dtype=np.int64),
            words=np.array([row.words for row in rows], dtype=np.int64),
            plain=np.array([row.plain for row in rows], dtype=np.bool_),
        )
        write_atomically(self._file("tokens", window, "npz"), tokens.getvalue())

    def read_window(self, window: int) -> list[WindowRow | None]:
        """The rows of a window; None of those that are not predicted."""
        rows: list[WindowRow | None] = []
        with np.load(self._file("tokens", window, "npz"), allow_pickle=False) as stored:
            ids, mask, words, plain = (stored[key] for key in ("ids", "mask", "words", "plain"))
            ends = np.cumsum(stored["lengths"]).tolist()
        begin = 0
        for number, end in enumerate(ends):
            label = Tags([UNKNOWN] * words[number]) if words[number] else UNKNOWN
            row = Row(
                ids=ids[begin:end], mask=mask[begin:end], documents=(end - begin,), label=label
            )
            rows.append(WindowRow(row, bool(plain[number])) if end > begin else None)
            begin = end
        return rows

    def write_results(self, window: int, results: Sequence[dict[str, Any]]) -> None:
        """Write what the model says of the rows of a window; nothing of those not predicted."""
        text = "".join(map(write_line, results))
        write_atomically(self._file("results", window, "jsonl"), text)

    def has_results(self, window: int) -> bool:
        """Tell whether a window has been predicted."""
        return self._file("results", window, "jsonl").is_file()

    def count_results(self) -> int:
        """Count the windows that have been predicted."""
        return sum(1 for _ in self.path.glob("results-*.jsonl"))

    def read_rows(self, window: int) -> Iterator[tuple[dict[str, Any], str | None, dict[str, Any]]]:
        """The fields, the error and the result of each row of a window."""
        inputs, results = (
            self._file(name, window, "jsonl").read_text(encoding="utf-8").split("\n")[:-1]
            for name in ("inputs", "results")
        )
        for given, result in zip(inputs, results, strict=True):
            values = json.loads(given)
            yield values["fields"], values["error"], json.loads(result)

    def _file(self, name: str, window: int, ending: str) -> Path:
        return self.path / f"{name}-{window:06d}.{ending}"
