"""Collect numbers and examples of prepared data, for a look at it before training."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.data.store.token_store import Row, Rows
from llmtune.draws import Draw, draw_rows
from llmtune.security.redaction import redact_pieces
from llmtune.task.labels import Tags

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

#: Bars of the histogram.
BARS = 12

#: Rows over which padding is averaged, drawn in the order of training.
PADDING_ROWS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """The lengths of documents, in tokens."""

    count: int
    mean: float
    shortest: int
    p50: int
    p95: int
    p99: int
    longest: int
    edges: list[int]
    """Borders of the histogram's bars: a bar holds ``edges[i] <= tokens < edges[i + 1]``.

    The last bar also holds its end.
    """
    rows: list[int]
    """Documents in each bar."""
    trained: list[int]
    """Trained tokens in each bar."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """Share of the places in a batch that hold no token, by how rows are put together."""

    to_max_length: float
    """Every row padded to ``max_seq_length``."""
    random: float
    """Micro-batches of random rows, each padded to its longest."""
    grouped: float
    """Batches of llmtune without packing: rows of a step are sorted by length, then divided."""
    packed: float | None
    """Packed rows; None where packing is off."""


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Neighboring tokens that are all trained or all not."""

    text: str
    trained: bool


def measure_lengths(rows: Rows) -> Lengths:
    """Compute histogram and percentiles of the documents."""
    lengths, trained = rows.documents("lengths"), rows.documents("trained")
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, math.ceil((high - low + 1) / BARS))
    edges = list(range(low, high + width + 1, width))
    bars = (lengths - low) // width
    count = len(edges) - 1
    p50, p95, p99 = (int(value) for value in np.percentile(lengths, [50, 95, 99], method="higher"))
    return Lengths(
        count=len(lengths),
        mean=float(lengths.mean()),
        shortest=low,
        p50=p50,
        p95=p95,
        p99=p99,
        longest=high,
        edges=edges,
        rows=np.bincount(bars, minlength=count).tolist(),
        trained=np.bincount(bars, weights=trained, minlength=count).astype(int).tolist(),
    )


def measure_padding(
    rows: Rows,
    max_seq_length: int,
    micro_batch: int,
    global_batch: int,
    seed: int,
    efficiency: float | None,
) -> Padding:
    """Measure what padding costs.

    Args:
        micro_batch: Rows of a forward pass.
        global_batch: Rows of an optimizer step.
        efficiency: Of packing, where it is on.
    """
    lengths = rows.documents("lengths")
    order = draw_rows(len(lengths), PADDING_ROWS, seed, Draw.padding)
    drawn = lengths[order]
    in_steps = np.concatenate(
        [np.sort(drawn[at : at + global_batch])[::-1] for at in range(0, len(drawn), global_batch)]
        or [drawn]
    )
    return Padding(
        to_max_length=1 - float(lengths.mean()) / max_seq_length,
        random=_padding(drawn, micro_batch),
        grouped=_padding(in_steps, micro_batch),
        packed=None if efficiency is None else 1 - efficiency,
    )


def _padding(lengths: NDArray[Any], micro_batch: int) -> float:
    places = sum(
        int(lengths[at : at + micro_batch].max()) * len(lengths[at : at + micro_batch])
        for at in range(0, len(lengths), micro_batch)
    )
    return 1 - float(lengths.sum()) / max(1, places)


def show_row(rows: Rows, index: int, tokenizer: PreTrainedTokenizerBase) -> list[TextSpan]:
    """Decode a row into spans of text that are trained or not.

    What is trained of a row with a label is the label, behind the text; tags stand behind their
    words.
    """
    row = rows.row(index)
    if row.label is not None:
        return _show_labeled(row, tokenizer)
    ids, mask = row.ids, row.mask
    borders = [0, *(np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist(), len(ids)]
    return [
        TextSpan(str(tokenizer.decode(ids[begin:end].tolist())), bool(mask[begin]))
        for begin, end in itertools.pairwise(borders)
        if end > begin
    ]


def _show_labeled(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[TextSpan]:
    borders, tags = [0, len(row.ids)], [describe_label(row.label)]
    if isinstance(row.label, Tags):
        starts = np.flatnonzero(row.mask).tolist()
        borders, tags = [0, *starts, len(row.ids)], ["", *map(str, row.label)]
    spans = []
    for (begin, end), tag in zip(itertools.pairwise(borders), tags, strict=True):
        spans.append(TextSpan(str(tokenizer.decode(row.ids[begin:end].tolist())), False))
        if tag:
            spans.append(TextSpan(tag, True))
    return spans


def describe_label(label: Any) -> str:
    """Write a label as text: a class, or several in a list."""
    if isinstance(label, tuple):
        return json.dumps(list(label), ensure_ascii=False)
    return str(label)


def redact_texts(spans: list[TextSpan]) -> list[TextSpan]:
    """Redact secrets, also one that begins in a span and ends in another."""
    shown = redact_pieces([span.text for span in spans])
    return [replace(span, text=text) for span, text in zip(spans, shown, strict=True)]
