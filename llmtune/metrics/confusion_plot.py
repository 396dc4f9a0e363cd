"""Draw ``confusion_matrix.png``: what was taken for what."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llmtune.metrics.confusion import ConfusionTable, TableKind
from llmtune.metrics.counts import divide
from llmtune.metrics.fonts import can_draw, find_families
from llmtune.storage.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Beyond these many rows, counts are shown as shades alone, and classes by their index.
_MAX_ROWS_WITH_COUNTS = 25
_MAX_ROWS_WITH_NAMES = 60
_MAX_NAME = 28
#: The share from which on a cell is dark.
_DARK = 0.3
#: Inches.
_CELL, _MIN_SIDE, _MAX_SIDE = 0.55, 2.2, 10.0


class _Grid(NamedTuple):
    """The cells of a picture. Lists of shape (rows, columns)."""

    counts: list[list[int]]
    shares: list[list[float]]
    """The shade of each cell, from 0 to 1."""
    columns: Sequence[str] | None
    """Names of the columns; None where they are those of the rows."""
    column_title: str
    shade_title: str


def draw_confusion(table: ConfusionTable, picture: Path) -> bool:
    """Draw a table; the same table makes the same bytes with the same fonts.

    Names that no font of this machine can draw are shown as their index, from 0.

    Returns:
        Whether there was anything to draw: a table without classes is not drawn.

    Raises:
        OSError: The disk refused.
    """
    if not table.names:
        return False
    # pyplot would look for a screen, and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    grid = _arrange(table)
    rows, columns = len(grid.counts), len(grid.counts[0])
    height = min(_MAX_SIDE, max(_MIN_SIDE, rows * _CELL))
    width = height if grid.columns is None else max(_MIN_SIDE, columns * 1.1)
    figure = Figure(figsize=(width + 3.0, height + 2.0), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # A class that is taken for another one in a few of a hundred rows is to be seen.
    shades = PowerNorm(gamma=0.5, vmin=0, vmax=1)
    image = axes.imshow(grid.shares, cmap="Blues", norm=shades, aspect="auto")
    if rows <= _MAX_ROWS_WITH_COUNTS:
        _write_counts(axes, grid)
    _name_rows_and_columns(axes, table, grid)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(grid.shade_title)

    drawn = io.BytesIO()
    # matplotlib would write its version into the file.
    canvas.print_png(drawn, metadata={"Software": None})
    write_atomically(picture, drawn.getvalue())
    return True


def _arrange(table: ConfusionTable) -> _Grid:
    """Lay out the cells: a confusion matrix, or for each label what was found, missed and wrong."""
    sums = table.sums
    if table.kind is TableKind.CLASSES:
        return _Grid(
            counts=[list(row) for row in table.counts],
            shares=[[divide(count, sum(row)) for count in row] for row in table.counts],
            columns=None,
            column_title="predicted",
            shade_title="share of the true class's rows",
        )
    counts = [
        [correct, true - correct, predicted - correct]
        for correct, predicted, true in zip(sums.correct, sums.predicted, sums.true, strict=True)
    ]
    shares = [
        [
            divide(found, found + missed),
            divide(missed, found + missed),
            divide(wrong, found + wrong),
        ]
        for found, missed, wrong in counts
    ]
    return _Grid(
        counts=counts,
        shares=shares,
        columns=("found\n(of true)", "missed\n(of true)", "wrong\n(of predicted)"),
        column_title="",
        shade_title="share",
    )


def _write_counts(axes: Axes, grid: _Grid) -> None:
    for row, (counts, shares) in enumerate(zip(grid.counts, grid.shares, strict=True)):
        for column, (count, share) in enumerate(zip(counts, shares, strict=True)):
            color = "white" if share > _DARK else "black"
            size = 10 if len(grid.counts) <= 12 else 7
            axes.text(column, row, f"{count}", ha="center", va="center", color=color, fontsize=size)


def _name_rows_and_columns(axes: Axes, table: ConfusionTable, grid: _Grid) -> None:
    row_title = {"classes": "true", "labels": "label", "entities": "type"}[table.kind]
    rows = len(table.names)
    if rows > _MAX_ROWS_WITH_NAMES:
        row_title += ", by index"
    else:
        texts = [_shorten(" ".join(name.split())) for name in table.names]
        families = find_families(texts)
        drawable = [bool(text) and can_draw(text, families) for text in texts]
        if not all(drawable):
            row_title += " (by index where no font has the name)"
        labels = [text if drawable[index] else f"{index}" for index, text in enumerate(texts)]
        # A dollar would begin a formula.
        style: dict[str, Any] = {"fontfamily": families, "parse_math": False}
        style["fontsize"] = 9 if rows <= 30 else 6
        axes.set_yticks(range(rows), labels=labels, **style)
        if grid.columns is None:
            axes.set_xticks(range(rows), labels=labels, rotation=45, ha="right", **style)
    if grid.columns is not None:
        axes.set_xticks(range(len(grid.columns)), labels=grid.columns)
    axes.set(xlabel=grid.column_title, ylabel=row_title)


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_NAME else f"{text[: _MAX_NAME - 1]}…"
