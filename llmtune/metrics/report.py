"""Write the table of an evaluation to a run folder, and its scores as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmtune.metrics.confusion import ConfusionTable, ScoreRow, TableKind
from llmtune.metrics.confusion_plot import draw_confusion
from llmtune.storage import layout
from llmtune.storage.atomic import write_atomically

#: Classes in the table of a model card.
MAX_ROWS = 30


def write_confusion(table: ConfusionTable, folder: Path) -> None:
    """Write ``confusion_matrix.json`` and ``confusion_matrix.png``; one process does.

    Raises:
        OSError: The disk refused.
    """
    write_table(table, folder)
    draw_confusion(table, folder / layout.CONFUSION_PLOT)


def write_table(table: ConfusionTable, folder: Path) -> None:
    """Write ``confusion_matrix.json`` alone, without its picture; one process does.

    Raises:
        OSError: The disk refused.
    """
    # Half a surrogate pair, which UTF-8 cannot hold, becomes the escape that JSON has for it.
    text = table.to_json().encode(errors="backslashreplace")
    write_atomically(folder / layout.CONFUSION_TABLE, text)


def read_confusion(folder: Path) -> ConfusionTable | None:
    """Read ``confusion_matrix.json``; None where there is none, or none that this version reads."""
    try:
        return ConfusionTable.from_json((folder / layout.CONFUSION_TABLE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None


def format_scores(table: ConfusionTable, escape: Callable[[str], str]) -> str:
    """Format the scores of each class and their averages as a Markdown table, in the table's order.

    Of more than 30 classes, those with the largest support are shown, and a note says so.

    Args:
        escape: Writes a name so that Markdown shows it as it is, on one line.
    """
    title = {
        TableKind.CLASSES: "class",
        TableKind.LABELS: "label",
        TableKind.ENTITIES: "entity type",
    }[table.kind]
    by_support = sorted(range(len(table.names)), key=lambda index: -table.scores[index].support)
    shown = [table.scores[index] for index in sorted(by_support[:MAX_ROWS])]
    lines = [f"| {title} | precision | recall | F1 | support |", "| --- | --- | --- | --- | --- |"]
    lines += [_format_row(escape(row.name), row) for row in shown]
    lines += [_format_row(f"*{row.name} average*", row) for row in table.averages]
    if len(shown) < len(table.names):
        lines += [
            "",
            f"The {len(shown)} of {len(table.names)} with the largest support;"
            f" all of them are in `{layout.CONFUSION_TABLE}`.",
        ]
    return "\n".join(lines) + "\n"


def _format_row(name: str, row: ScoreRow) -> str:
    scores = " | ".join(f"{score:.3f}" for score in (row.precision, row.recall, row.f1))
    return f"| {name} | {scores} | {row.support:,} |"
