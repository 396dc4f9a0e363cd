"""Write the tokens of a source: an Arrow file, and small arrays of numbers beside it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.data.rows.problem_report import write_problems
from llmtune.data.store.token_store import BAD_ROWS, COLUMNS, LABELS, ROWS, SUMMARY, StoreSummary
from llmtune.data.tokenize.token_row import TokenBlock
from llmtune.task.labels import Label, label_to_json

if TYPE_CHECKING:
    import pyarrow as pa


def write_store(blocks: Iterable[TokenBlock], folder: Path) -> StoreSummary:
    """Write blocks as they come; only their numbers stay in memory."""
    import pyarrow as pa

    summary = StoreSummary()
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    labels: list[Label] = []
    overlong: Counter[int] = Counter()
    special: set[int] = set()
    unknown: set[str] = set()
    formats: set[str] = set()
    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("mask", pa.list_(pa.bool_()))])
    with (
        pa.OSFile(str(folder / ROWS), "wb") as file,
        pa.ipc.new_file(file, schema) as writer,
        (folder / BAD_ROWS).open("w", encoding="utf-8") as bad_rows,
    ):
        # Tokens go to the file at once; numbers per row and counts are collected.
        for block in blocks:
            if not summary.files or summary.files[-1] != block.file:
                summary.files.append(block.file)
            for name in ("lengths", "trained", "hashes", "lines", "begins"):
                columns[name].append(getattr(block, name))
            columns["files"].append(
                np.full(len(block.lengths), len(summary.files) - 1, dtype=np.int32)
            )
            labels += block.labels
            overlong.update(block.overlong)
            special |= block.special
            unknown |= block.unknown
            formats.add(block.format)
            summary.max_id = max(summary.max_id, int(block.ids.max(initial=-1)))
            summary.rows += len(block.lengths)
            summary.truncated += block.truncated
            summary.bad_rows += len(block.problems)
            write_problems(block.problems, bad_rows)
            if len(block.lengths):
                writer.write_batch(_to_arrow(block, schema))
    summary.overlong = sorted(overlong.items())
    summary.special = sorted(special)
    summary.unknown = sorted(unknown)
    summary.formats = sorted(formats)
    _write_numbers(columns, labels, summary, folder)
    return summary


def _to_arrow(block: TokenBlock, schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    offsets = pa.array(np.concatenate([[0], np.cumsum(block.lengths)]).astype(np.int32))
    lists = [
        pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (block.ids, block.mask)
    ]
    return pa.RecordBatch.from_arrays(lists, schema=schema)


def _write_numbers(
    columns: dict[str, list[Any]], labels: list[Any], summary: StoreSummary, folder: Path
) -> None:
    for name, dtype in COLUMNS.items():
        values = np.concatenate(columns[name]) if columns[name] else np.zeros(0, dtype=dtype)
        np.save(folder / f"{name}.npy", values)
    if labels:
        text = json.dumps([label_to_json(label) for label in labels], ensure_ascii=False)
        (folder / LABELS).write_text(text)
    (folder / SUMMARY).write_text(json.dumps(asdict(summary)))
