"""The page of one run: curves, plan, events, time, data, classes, answers, how to load it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llmtune.errors import ConfigError
from llmtune.metrics.confusion import TableKind
from llmtune.report.charts import (
    MOST_CLASSES,
    Mark,
    Series,
    draw_bars,
    draw_confusion,
    draw_curves,
    draw_histogram,
    draw_timeline,
)
from llmtune.report.columns import Point, smooth
from llmtune.report.load_text import to_blocks
from llmtune.report.page import Answer, Block, Code, Heading, Page, Row, Section, Table, Text
from llmtune.report.planned import (
    compare,
    largest_memory_bytes,
    measured_speed,
    planned_memory_bytes,
    seconds_by_phase,
)
from llmtune.report.run_facts import RunFacts
from llmtune.report.settings_table import flatten, show
from llmtune.task.task import AUTO, find_task
from llmtune.units import counted, format_bytes, format_count, format_seconds

#: Rows of a training loss from which on it is drawn faint, behind its average.
_MANY_STEPS = 100
#: Bars of classes, and rows of a table of scores.
_MOST_BARS, _MOST_SCORES = 30, 60
#: Key of a record -> title, unit and format of its curve, beside losses and metrics.
_CURVES = (
    ("learning_rate", "Learning rate", "learning rate", ".3~g"),
    ("grad_norm", "Gradient norm", "norm before clipping", ".3~g"),
    ("tokens_per_second", "Throughput", "tokens per second", ".3~s"),
    ("mfu", "Model FLOPs utilization", "share of the GPUs' speed", ".3~%"),
    ("memory_bytes", "Memory", "bytes of a rank", ".3~s"),
    ("save_pause_seconds", "Pause of a save", "seconds", ".3~g"),
)


def build_run_page(facts: RunFacts) -> Page:
    """Build the page of a run."""
    sections = [
        Section(name="curves", title="Curves", blocks=_curves(facts)),
        Section(name="planned", title="Planned and happened", blocks=_planned(facts)),
        Section(name="events", title="Restarts and fallbacks", blocks=_events(facts)),
        Section(name="time", title="Where the time went", blocks=_time(facts)),
        Section(name="data", title="Data", blocks=_data(facts)),
        Section(name="classes", title="Classes", blocks=_classes(facts)),
        Section(name="answers", title="Answers before and after", blocks=_answers(facts)),
        Section(name="load", title="Load and serve", blocks=_load(facts)),
        Section(name="settings", title="Settings", blocks=_settings(facts)),
    ]
    return Page(
        title=facts.name,
        state=facts.state,
        summary=_summary(facts),
        sections=[section for section in sections if section.blocks],
        notes=facts.notes,
        written=f"Written by llmtune on {format_clock(time.time())}.",
    )


def format_clock(seconds: float) -> str:
    """Format seconds since 1970 as date and time; an impossible number is written as it is."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"{seconds:g} s after 1970"


def _summary(facts: RunFacts) -> list[tuple[str, str]]:
    metrics, record = facts.metrics, facts.record
    steps = record.steps.total_steps if record.steps is not None else 0
    step = f"{metrics.last_step or 0:,}" + (f" of {steps:,}" if steps else "")
    rows = [("step", step)]
    for key, name in (("loss", "training loss"), ("eval_loss", "held-out loss")):
        values = metrics.get(key).values
        if len(values):
            text = f"{values[0]:.4f} → {values[-1]:.4f}" if len(values) > 1 else f"{values[0]:.4f}"
            rows.append((name, text))
    if (speed := measured_speed(facts)) is not None:
        rows.append(("tokens per second", f"{speed:,.0f}"))
    if (memory := largest_memory_bytes(facts)) is not None:
        rows.append(("memory at its peak", format_bytes(memory)))
    if seconds := sum(metrics.get("seconds").values):
        rows.append(("in steps", format_seconds(seconds)))
    if name := facts.get("model.name_or_path"):
        rows.append(("model", str(name).rstrip("/").rpartition("/")[2]))
    if tuner := facts.get("tuner.kind"):
        rows.append(("tuner", str(tuner)))
    if record.placement is not None and record.world_size:
        ranks = counted(record.world_size, "rank")
        rows.append(("placement", f"{record.placement.rung}, {ranks}"))
    return rows


def averaged(points: Sequence[Point], name: str) -> list[Series]:
    """Return the curve of a number of every step, behind its average where it has many points."""
    if len(points) < _MANY_STEPS:
        return [Series(name=name, points=points)]
    return [
        Series(name=name, points=points, is_faint=True),
        Series(name=name, points=smooth(list(points))),
    ]


def _curves(facts: RunFacts) -> list[Block]:
    metrics = facts.metrics
    blocks: list[Block] = []
    loss, held_out = list(metrics.get("loss").points()), list(metrics.get("eval_loss").points())
    losses = averaged(loss, "training") if loss else []
    if held_out:
        losses.append(Series(name="held out", points=held_out))
    if losses:
        blocks.append(draw_curves("loss", "Loss", "loss", losses, _marks(facts)))
    for number, key in enumerate(metrics.evaluation_keys()):
        if key == "eval_loss":
            continue
        name = key.removeprefix("eval_")
        series = Series(name=name, points=list(metrics.get(key).points()))
        blocks.append(draw_curves(f"metric-{number}", f"Held-out {name}", name, [series]))
    planned = {
        "tokens_per_second": facts.record.tokens_per_second,
        "memory_bytes": planned_memory_bytes(facts),
    }
    for key, title, unit, number_format in _CURVES:
        points = list(metrics.get(key).points())
        if not points:
            continue
        curves = averaged(points, "measured")
        if value := planned.get(key):
            ends = [(step, value) for step, _ in (points[0], points[-1])]
            curves.append(Series(name="planned", points=ends, is_dashed=True))
        name = key.replace("_", "-")
        blocks.append(draw_curves(name, title, unit, curves, number_format=number_format))
    return blocks


def _marks(facts: RunFacts) -> list[Mark]:
    marks = [Mark(failure.step, _describe_failure(failure)) for failure in facts.record.history]
    marks += [Mark(restart.step, f"restart: {restart.reason}") for restart in facts.restarts]
    return sorted(marks, key=lambda mark: mark.step)


def _describe_failure(failure: Any) -> str:
    stage = failure.candidate.get("zero_stage") if isinstance(failure.candidate, dict) else None
    where = f" under ZeRO {stage}" if stage is not None else ""
    return f"fallback: {failure.pool} memory ran out{where} ({failure.phase})"


def _planned(facts: RunFacts) -> list[Block]:
    rows = compare(facts)
    if not rows:
        return []
    head = ["", "planned", "happened", "ratio"]
    return [Table(caption="What was planned, and what happened", head=head, rows=rows)]


def _events(facts: RunFacts) -> list[Block]:
    events = [
        (failure.time, "fallback", f"{_describe_failure(failure)}: {failure.message}", failure.step)
        for failure in facts.record.history
    ]
    for restart in facts.restarts:
        kind = "rollback" if restart.rollback else "restart"
        origin = restart.resumed_from or "the beginning"
        text = f"{restart.reason}; the attempt before had begun from {origin}"
        events.append((restart.time, kind, text, restart.step))
    if not events:
        blocks: list[Block] = [Text("No restart and no fallback.")]
        if facts.end is not None and facts.end.message:
            blocks.append(Text(f"The last start {facts.end.outcome}: {facts.end.message}"))
        return blocks
    if facts.end is not None:
        step = facts.metrics.last_step or 0
        text = facts.end.message or "the end of the last start"
        events.append((facts.end.time, facts.end.outcome, text, step))
    events.sort(key=lambda event: event[0])
    rows = [[format_clock(at), kind, f"{step:,}", text] for at, kind, text, step in events]
    return [
        draw_timeline("timeline", "Events", [(at, kind, text) for at, kind, text, _ in events]),
        Table(caption="Events", head=["time", "kind", "step", "what happened"], rows=rows),
    ]


def _time(facts: RunFacts) -> list[Block]:
    phases = seconds_by_phase(facts)
    if not phases:
        return []
    whole = sum(seconds for _, seconds in phases)
    rows = [
        [name, f"{seconds:,.1f} s", f"{100 * seconds / whole:.1f} %"] for name, seconds in phases
    ]
    origin = "of the last start" if facts.seconds else "of the steps so far"
    return [
        replace(draw_bars("phases", f"Seconds {origin}, on rank 0", "seconds", phases), table=None),
        Table(caption=f"Phases {origin}", head=["phase", "time", "share"], rows=rows),
    ]


def _data(facts: RunFacts) -> list[Block]:
    data = facts.record.data
    blocks: list[Block] = []
    if data is not None and data.train.rows:
        train, held_out = data.train, data.eval
        counts = {
            "rows": f"{train.rows:,}",
            "held-out rows": f"{held_out.rows:,}" if held_out is not None else "none",
            "tokens": f"{train.tokens:,}",
            "trained tokens": f"{train.supervised_tokens:,}"
            f" ({train.supervised_tokens / max(1, train.tokens):.1%})",
            "truncated rows": f"{train.truncated:,}",
            "dropped as over-long": f"{train.dropped:,}",
            "skipped rows": f"{train.skipped:,}",
            "equal to a held-out row, left out": f"{train.duplicates_of_eval:,}",
        }
        if train.packing_efficiency is not None:
            counts["packed rows filled to"] = f"{train.packing_efficiency:.1%}"
        if data.formats:
            counts["read as"] = ", ".join(data.formats)
        rows = [[name, value] for name, value in counts.items()]
        blocks.append(Table(caption="The training rows", head=["", ""], rows=rows))
        if data.classes and len(data.classes) == len(data.class_counts):
            pairs = zip(map(str, data.classes), map(float, data.class_counts), strict=True)
            bars = sorted(pairs, key=lambda pair: -pair[1])[:_MOST_BARS]
            blocks.append(draw_bars("class-counts", "Training rows of a class", "rows", bars))
    return [*blocks, *_lengths(facts.examples.get("lengths")), *_rows(facts.examples.get("rows"))]


def _lengths(lengths: Any) -> list[Block]:
    """Draw the histogram of ``data_examples.json``, if it is one."""
    if not isinstance(lengths, dict):
        return []
    edges, counts = (_integers(lengths.get(key)) for key in ("edges", "rows"))
    if not counts or len(edges) != len(counts) + 1:
        return []
    return [draw_histogram("lengths", "Lengths of the rows", edges, counts, "documents")]


def _integers(values: Any) -> list[int]:
    """Return a list of integers; empty for anything else."""
    found = values if isinstance(values, list) else []
    return found if all(type(number) is int for number in found) else []


def _rows(rows: Any) -> list[Block]:
    """Show the rows of ``data_examples.json``: what is trained on is marked."""
    blocks: list[Block] = []
    for row in rows if isinstance(rows, list) else []:
        pieces = row.get("pieces") if isinstance(row, dict) else None
        if not isinstance(pieces, list):
            continue
        shown = [
            (str(piece[0]), bool(piece[1]))
            for piece in pieces
            if isinstance(piece, list) and len(piece) == 2
        ]
        blocks.append(Row(str(row.get("from", "a row")), shown))
    if blocks:
        text = "What is marked is what the model is trained to say; the rest is given to it."
        blocks = [Heading("Rows as the model sees them"), Text(text), *blocks]
    return blocks


def _classes(facts: RunFacts) -> list[Block]:
    table = facts.confusion
    if table is None:
        return []
    blocks: list[Block] = []
    is_drawn = table.kind is TableKind.CLASSES and 0 < len(table.names) <= MOST_CLASSES
    if is_drawn:
        blocks.append(draw_confusion("confusion", "Which classes were taken for which", table))
    averages = [replace(row, name=f"{row.name} average") for row in table.averages]
    scores = [*table.scores[:_MOST_SCORES], *averages]
    rows = [
        [
            row.name,
            *(f"{value:.3f}" for value in (row.precision, row.recall, row.f1)),
            str(row.support),
        ]
        for row in scores
    ]
    head = ["class", "precision", "recall", "F1", "rows"]
    blocks.append(Table(caption="Scores of the newest evaluation", head=head, rows=rows))
    if len(table.scores) > _MOST_SCORES:
        blocks.append(Text(f"{len(table.scores) - _MOST_SCORES:,} more classes are not listed."))
    return blocks


def _answers(facts: RunFacts) -> list[Block]:
    none_yet, empty = "(none yet)", "(an empty answer)"
    return [
        Answer(
            prompt=str(sample.get("prompt", "")),
            before=str(sample.get("before", none_yet)) or empty,
            after=str(sample.get("after", none_yet)) or empty,
            expected=str(sample.get("expected", "")),
        )
        for sample in facts.samples
    ]


def _load(facts: RunFacts) -> list[Block]:
    blocks: list[Block] = []
    for name, section in facts.exports.items():
        blocks += [Heading(f"In the folder {name}"), *to_blocks(section)]
    if facts.finished is None:
        is_left = not facts.is_running and not blocks
        text = Text("Nothing is exported yet; the same command resumes the run.")
        return [*blocks, *([text] if is_left else [])]
    run = shlex.quote(str(facts.folder))
    commands = [f"python -m llmtune predict run={run} predict.input=FILE"]
    if _generates(facts):
        commands.insert(0, f'python -m llmtune chat run={run} chat.prompt="..."')
        commands.append(f"python -m llmtune export run={run} export=gguf")
    return [*blocks, Heading("With llmtune"), Code("\n".join(commands))]


def _generates(facts: RunFacts) -> bool:
    """Tell whether the model answers; False for a task that this llmtune does not have."""
    try:
        return find_task(str(facts.get("model.task", AUTO))).generates
    except ConfigError:
        return False


def _settings(facts: RunFacts) -> list[Block]:
    blocks: list[Block] = []
    if facts.record.notes:
        blocks.append(Text(f"Derived: {'; '.join(facts.record.notes)}."))
    values = flatten(facts.config)
    rows = [[key, show(value)] for key, value in values.items() if value not in (None, [], {})]
    if rows:
        blocks.append(
            Table(caption="All settings", head=["key", "value"], rows=rows, is_folded=True)
        )
    versions = [[name, str(value)] for name, value in facts.environment.items()]
    if versions:
        blocks.append(
            Table(caption="Versions", head=["package", "version"], rows=versions, is_folded=True)
        )
    if facts.record.shape is not None and facts.record.shape.parameters:
        shape = facts.record.shape
        text = (
            f"{format_count(shape.parameters)} parameters, of which"
            f" {format_count(shape.trainable_parameters)} are trained."
        )
        blocks.insert(0, Text(text))
    return blocks
