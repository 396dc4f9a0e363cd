"""Draw and write a page about the data: lengths, trained tokens, problems, rows with masks."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

import jinja2

from llmtune.data.report.statistics import Lengths, Padding, TextSpan
from llmtune.data.rows.problem_report import group_by_kind
from llmtune.data.rows.problems import Problem
from llmtune.security.redaction import redact

#: Trained and masked text: the same two colors in picture, page and terminal.
TRAINED_COLOR, MASKED_COLOR = "#1a7f37", "#8c959f"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """The contents of the page."""

    title: str
    numbers: dict[str, str]
    """Name -> value, as the terminal prints them."""
    lengths: Lengths | None
    padding: Padding | None
    problems: list[Problem]
    rows: list[tuple[str, list[TextSpan]]]
    """Location and text of some rows."""


def write_picture(lengths: Lengths, title: str, path: Path) -> None:
    """Draw two histograms: documents by length, and where the trained tokens are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), dpi=120)
    left, right = figure.subplots(1, 2)
    widths = [end - begin for begin, end in zip(lengths.edges[:-1], lengths.edges[1:], strict=True)]
    for axes, values, color, label in (
        (left, lengths.rows, "tab:blue", "documents"),
        (right, lengths.trained, TRAINED_COLOR, "trained tokens"),
    ):
        axes.bar(
            lengths.edges[:-1], values, width=widths, align="edge", color=color, edgecolor="white"
        )
        axes.set(xlabel="tokens of a document", ylabel=label)
        axes.grid(axis="y", alpha=0.3)
    left.axvline(lengths.p50, color="black", linewidth=1, label=f"median {lengths.p50}")
    left.axvline(
        lengths.p95, color="black", linewidth=1, linestyle="--", label=f"95 % {lengths.p95}"
    )
    left.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)


def write_page(report: DataReport, picture: Path | None, path: Path) -> None:
    """Write one HTML file that needs nothing else."""
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        _PAGE
    )
    image = base64.b64encode(picture.read_bytes()).decode() if picture is not None else ""
    text = page.render(
        report=report,
        image=image,
        problems=group_by_kind(report.problems),
        bars=list(_bars(report.lengths)) if report.lengths else [],
        trained=TRAINED_COLOR,
        masked=MASKED_COLOR,
    )
    path.write_text(redact(text), encoding="utf-8")


def _bars(lengths: Lengths) -> list[tuple[str, int, int]]:
    """Return range, documents and trained tokens of each bar."""
    ranges = zip(lengths.edges[:-1], lengths.edges[1:], strict=True)
    names = [f"{begin} - {end - 1}" for begin, end in ranges]
    return list(zip(names, lengths.rows, lengths.trained, strict=True))


_PAGE = Path(__file__).with_name("page.html.jinja").read_text()
