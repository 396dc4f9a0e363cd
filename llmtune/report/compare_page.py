"""Compare runs: tables of their results and of settings that differ, and overlaid curves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.report.charts import Series, draw_curves
from llmtune.report.columns import Point
from llmtune.report.page import Block, Page, Section, Table, Text
from llmtune.report.planned import (
    largest_memory_bytes,
    measured_speed,
    measured_step_seconds,
    planned_memory_bytes,
)
from llmtune.report.run_facts import RunFacts
from llmtune.report.run_page import averaged, format_clock
from llmtune.report.settings_table import find_differences, show
from llmtune.units import format_bytes

_ABSENT = "-"
_BYTES = ("memory_bytes", "planned_memory_bytes")
#: The first rows of the table of results; metrics come next.
_FIRST = ("folder", "state", "step", "loss", "eval_loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Several runs side by side."""

    names: list[str]
    """A name for each run, none twice."""
    values: list[dict[str, Any]]
    """The results of each run by name, as numbers."""
    results: list[list[str]]
    """The same as text, a row each: its name, and a cell for each run."""
    differences: list[list[str]]
    """The settings that differ, in the same form."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        settings = {key: dict(zip(self.names, row, strict=True)) for key, *row in self.differences}
        return {
            "runs": [
                {"name": name, **values}
                for name, values in zip(self.names, self.values, strict=True)
            ],
            "settings": settings,
        }


def compare_runs(runs: Sequence[RunFacts]) -> Comparison:
    """Compare runs; each is named by its folder where two have the same name."""
    names = name_runs(runs)
    values = [_results(facts) for facts in runs]
    keys = list(dict.fromkeys(key for result in values for key in result))
    # Metrics that only some runs have stand where those of the others are.
    keys.sort(
        key=lambda key: (_FIRST.index(key) if key in _FIRST else len(_FIRST), "eval_" not in key)
    )
    results = [[key, *(_write(key, result.get(key)) for result in values)] for key in keys]
    differences = find_differences([facts.config for facts in runs])
    return Comparison(
        names=names,
        values=values,
        results=results,
        differences=[[key, *row] for key, row in differences.items()],
    )


def name_runs(runs: Sequence[RunFacts]) -> list[str]:
    """Name each run: by its own name, or by its folder where two runs have the same name."""
    names = [facts.name for facts in runs]
    if len(set(names)) < len(names):
        names = [facts.folder.name for facts in runs]
    if len(set(names)) < len(names):
        names = [str(facts.folder) for facts in runs]
    return names


def _results(facts: RunFacts) -> dict[str, Any]:
    """Return what a run reached, and at which cost; what is not known is None."""
    metrics, finished = facts.metrics, facts.finished
    results: dict[str, Any] = {
        "folder": str(facts.folder),
        "state": facts.state,
        "step": metrics.last_step,
        "loss": metrics.last("loss"),
    }
    results |= {key: metrics.last(key) for key in metrics.evaluation_keys()}
    if finished is not None and finished.best is not None:
        results |= {f"best {key}": value for key, value in finished.best.items()}
    return results | {
        "tokens_per_second": measured_speed(facts),
        "seconds_per_step": measured_step_seconds(facts),
        "memory_bytes": largest_memory_bytes(facts),
        "planned_memory_bytes": planned_memory_bytes(facts),
        "restarts": len(facts.restarts),
        "fallbacks": len(facts.record.history),
    }


def _write(key: str, value: Any) -> str:
    if value is None:
        return _ABSENT
    if key in _BYTES:
        return format_bytes(value)
    return f"{value:,.5g}" if isinstance(value, float) else show(value)


def build_compare_page(runs: Sequence[RunFacts]) -> Page:
    """Build the page that compares runs."""
    compared = compare_runs(runs)
    head = ["", *compared.names]
    results = Table(caption="What each run reached", head=head, rows=compared.results)
    settings: Block = Text("The runs have the same settings.")
    if compared.differences:
        caption = "The value of each run"
        settings = Table(caption=caption, head=head, rows=compared.differences)
    sections = [
        Section(name="results", title="Results", blocks=[results]),
        Section(name="differences", title="Settings that differ", blocks=[settings]),
        Section(name="curves", title="Curves", blocks=_overlay(runs, compared.names)),
    ]
    return Page(
        title=f"Comparison of {len(runs)} runs",
        state=", ".join(dict.fromkeys(facts.state for facts in runs)),
        summary=[
            (name, _headline(facts)) for name, facts in zip(compared.names, runs, strict=True)
        ],
        sections=[section for section in sections if section.blocks],
        notes=[f"{facts.folder.name}: {note}" for facts in runs for note in facts.notes],
        written=f"Written by llmtune on {format_clock(time.time())}.",
    )


def _headline(facts: RunFacts) -> str:
    for key, name in (("eval_loss", "held-out loss"), ("loss", "loss")):
        if (value := facts.metrics.last(key)) is not None:
            return f"{name} {value:.4f}"
    return facts.state


def _overlay(runs: Sequence[RunFacts], names: Sequence[str]) -> list[Block]:
    """Draw each curve with a color for each run."""
    keys = list(dict.fromkeys(key for facts in runs for key in facts.metrics.evaluation_keys()))
    charts: list[tuple[str, str, str, str]] = [
        ("loss", "Training loss", "loss", ".4~g"),
        *((key, f"Held-out {key.removeprefix('eval_')}", key, ".4~g") for key in keys),
        ("learning_rate", "Learning rate", "learning rate", ".3~g"),
        ("grad_norm", "Gradient norm", "norm before clipping", ".3~g"),
        ("tokens_per_second", "Throughput", "tokens per second", ".3~s"),
        ("memory_bytes", "Memory", "bytes of a rank", ".3~s"),
    ]
    blocks: list[Block] = []
    for number, (key, title, unit, number_format) in enumerate(charts):
        is_of_steps = not key.startswith("eval_")
        curves = [
            curve
            for name, facts in zip(names, runs, strict=True)
            if len(facts.metrics.get(key))
            for curve in _draw_one(list(facts.metrics.get(key).points()), name, is_of_steps)
        ]
        if curves:
            blocks.append(
                draw_curves(f"curve-{number}", title, unit, curves, number_format=number_format)
            )
    return blocks


def _draw_one(points: list[Point], name: str, is_of_steps: bool) -> list[Series]:
    return averaged(points, name) if is_of_steps else [Series(name=name, points=points)]
