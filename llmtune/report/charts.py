"""Charts of a page, described with altair; colors and sizes of letters are the page's.

Names of metrics are values of the data and never names of fields: Vega reads a field's name as an
expression, and anybody may have written a metrics file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.report.columns import Point, thin
from llmtune.report.page import Chart, Table

if TYPE_CHECKING:
    from llmtune.metrics.confusion import ConfusionTable

#: Points of one curve on a page, which keep it below 2 MB.
MOST_POINTS = 800
#: A curve of fewer points shows each of them.
_FEW = 60
#: Classes that a heatmap shows, and up to which it writes their counts.
MOST_CLASSES, _WRITTEN_CLASSES = 40, 12
_HEIGHT = 260
#: JavaScript has no date beyond 8.64e15 milliseconds from 1970.
_MOST_SECONDS = 8.64e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A curve."""

    name: str
    points: Sequence[Point]
    is_dashed: bool = False
    """Something that was planned."""
    is_faint: bool = False
    """The raw numbers behind a smoothed curve."""


@dataclass(frozen=True, slots=True)
class Mark:
    """An event at a step of a curve."""

    step: float
    text: str


def draw_curves(
    name: str,
    title: str,
    unit: str,
    curves: Sequence[Series],
    marks: Sequence[Mark] = (),
    number_format: str = ".4~g",
) -> Chart:
    """Draw curves over the optimizer steps.

    Args:
        unit: The title of the vertical axis.
        curves: At least one, each with a point.
        marks: Events, drawn as vertical lines.
        number_format: How d3 writes a value.
    """
    import altair as alt

    names = list(dict.fromkeys(curve.name for curve in curves))
    # One curve needs no legend: the chart has its name.
    legend = None if len(names) == 1 else alt.Legend(symbolOpacity=1)
    scale = alt.Scale(domain=names)
    color = alt.Color("series:N", sort=names, title=None, scale=scale, legend=legend)
    x = alt.X("step:Q", title="optimizer step", axis=alt.Axis(format="~s", tickMinStep=1))
    y = alt.Y(
        "value:Q", title=unit, scale=alt.Scale(zero=False), axis=alt.Axis(format=number_format)
    )
    # Faint and dashed curves have their own data; the others share theirs with what the pointer is
    # told about them.
    layers: list[Any] = []
    rows: list[dict[str, Any]] = []
    for curve in curves:
        values = _to_rows(curve)
        if not (curve.is_faint or curve.is_dashed):
            rows += values
            continue
        dash, opacity = ([6, 4], 1.0) if curve.is_dashed else ([1, 0], 0.35)
        line = chart_of(values).mark_line(strokeDash=dash, opacity=opacity)
        layers.append(line.encode(x=x, y=y, color=color))
    base = alt.Chart().encode(x=x, y=y, color=color)
    lines = [base.mark_line(point=len(rows) <= _FEW), _hover(base, number_format)]
    layers.append(alt.layer(*lines, data=chart_of(rows).data))
    if marks:
        layers.append(_rules(marks))
    return Chart(
        name=name,
        title=title,
        spec=finish_chart(alt.layer(*layers)),
        text=_describe_curves(title, curves, marks),
        table=_last_values(title, curves),
    )


def _to_rows(curve: Series) -> list[dict[str, Any]]:
    points = thin(list(curve.points), MOST_POINTS)
    return [{"step": step, "value": short(value), "series": curve.name} for step, value in points]


def _hover(base: Any, number_format: str) -> Any:
    """Show the numbers of the point that is nearest to the pointer.

    Args:
        base: A chart without data, with its axes and colors.
    """
    import altair as alt

    nearest = alt.selection_point(
        name="nearest",
        nearest=True,
        on="pointerover",
        clear="pointerout",
        fields=["step", "series"],
        empty=False,
    )
    tooltip = [
        alt.Tooltip("series:N", title="curve"),
        alt.Tooltip("step:Q", title="step", format=","),
        alt.Tooltip("value:Q", title="value", format=number_format),
    ]
    opacity = alt.condition(nearest, alt.value(1), alt.value(0))
    points = base.mark_point(size=70, filled=True)
    return points.encode(opacity=opacity, tooltip=tooltip).add_params(nearest)


def _rules(marks: Sequence[Mark]) -> Any:
    import altair as alt

    values = [{"step": mark.step, "event": mark.text} for mark in marks]
    rules = chart_of(values).mark_rule(strokeDash=[2, 3], strokeWidth=2)
    return rules.encode(x="step:Q", tooltip=[alt.Tooltip("event:N", title="event")])


def draw_bars(name: str, title: str, unit: str, bars: Sequence[tuple[str, float]]) -> Chart:
    """Draw horizontal bars, in their order.

    Args:
        unit: The title of the axis of values.
        bars: Name and value; at least one.
    """
    import altair as alt

    values = [{"name": label, "value": short(value)} for label, value in bars]
    names = [label for label, _ in bars]
    chart = (
        chart_of(values)
        .mark_bar()
        .encode(
            x=alt.X("value:Q", title=unit, axis=alt.Axis(format=",~g", tickCount=5)),
            y=alt.Y("name:N", sort=names, title=None, axis=alt.Axis(labelLimit=170)),
            tooltip=[
                alt.Tooltip("name:N", title=title),
                alt.Tooltip("value:Q", title=unit, format=",.4~g"),
            ],
        )
    )
    largest = max(bars, key=lambda bar: bar[1])
    rows = [[label, f"{value:,.6g}"] for label, value in bars]
    return Chart(
        name=name,
        title=title,
        spec=finish_chart(chart, height=max(60, 26 * len(bars))),
        text=f"Bars of {unit} for {len(bars)} names; the largest is {largest[0]}.",
        table=Table(caption=title, head=["", unit], rows=rows, is_folded=True),
    )


def draw_timeline(name: str, title: str, events: Sequence[tuple[float, str, str]]) -> Chart:
    """Draw events by the clock.

    Args:
        events: Seconds since 1970, kind and text of each; at least one.
    """
    import altair as alt

    values = [
        {"time": 1000 * at, "kind": kind, "event": text}
        for at, kind, text in events
        if abs(at) <= _MOST_SECONDS
    ]
    kinds = list(dict.fromkeys(kind for _, kind, _ in events))
    chart = (
        chart_of(values)
        .mark_point(size=120, filled=True)
        .encode(
            x=alt.X("time:T", title="time (UTC)", scale=alt.Scale(type="utc")),
            y=alt.Y("kind:N", sort=kinds, title=None, axis=alt.Axis(labelLimit=110)),
            color=alt.Color("kind:N", sort=kinds, legend=None),
            tooltip=[
                alt.Tooltip("utcyearmonthdatehoursminutesseconds(time):T", title="time (UTC)"),
                alt.Tooltip("event:N", title="event"),
            ],
        )
    )
    return Chart(
        name=name,
        title=title,
        spec=finish_chart(chart, height=max(70, 36 * len(kinds))),
        text=f"{len(events)} events by the clock; the table below lists them.",
    )


def draw_histogram(
    name: str, title: str, edges: Sequence[int], counts: Sequence[int], unit: str
) -> Chart:
    """Draw a histogram.

    Args:
        edges: Borders of the bars, one more than there are counts.
        unit: What is counted.
    """
    import altair as alt

    ranges = list(zip(edges[:-1], edges[1:], counts, strict=True))
    values = [{"from": low, "to": high, "count": count} for low, high, count in ranges]
    chart = (
        chart_of(values)
        .mark_bar()
        .encode(
            x=alt.X("from:Q", bin="binned", title="tokens", axis=alt.Axis(format="~s")),
            x2="to:Q",
            y=alt.Y("count:Q", title=unit, axis=alt.Axis(format="~s")),
            tooltip=[
                alt.Tooltip("from:Q", title="from", format=","),
                alt.Tooltip("to:Q", title="below", format=","),
                alt.Tooltip("count:Q", title=unit, format=","),
            ],
        )
    )
    rows = [[f"{low:,} to {high - 1:,}", f"{count:,}"] for low, high, count in ranges]
    return Chart(
        name=name,
        title=title,
        spec=finish_chart(chart, height=180),
        text=f"A histogram of {sum(counts):,} {unit} by their tokens, {edges[0]:,} to"
        f" {edges[-1] - 1:,}.",
        table=Table(caption=title, head=["tokens", unit], rows=rows, is_folded=True),
    )


def draw_confusion(name: str, title: str, table: ConfusionTable) -> Chart:
    """Draw which classes were taken for which: of each true class, the shares of the predictions.

    Args:
        table: Rows with one class each, of at most :data:`MOST_CLASSES` classes.
    """
    import altair as alt

    values = []
    for true, counts in zip(table.names, table.counts, strict=True):
        total = sum(counts) or 1
        for predicted, count in zip(table.names, counts, strict=True):
            values.append(
                {
                    "true": true,
                    "predicted": predicted,
                    "rows": count,
                    "share": short(count / total),
                }
            )
    order = list(table.names)
    base = chart_of(values).encode(
        x=alt.X("predicted:N", sort=order, title="predicted", axis=alt.Axis(labelLimit=90)),
        y=alt.Y("true:N", sort=order, title="true", axis=alt.Axis(labelLimit=90)),
        tooltip=["true:N", "predicted:N", "rows:Q", alt.Tooltip("share:Q", format=".1%")],
    )
    cells = base.mark_rect().encode(
        color=alt.Color(
            "share:Q",
            title="share of the true class",
            scale=alt.Scale(domain=[0, 1]),
            legend=alt.Legend(format=".0%"),
        )
    )
    layers: list[Any] = [cells]
    if len(order) <= _WRITTEN_CLASSES:
        # Both are parameters, which the page sets to colors of its theme.
        ink, paper = (alt.param(name=color, value="black") for color in ("ink", "paper"))
        on_dark = alt.when("datum.share > 0.5").then(alt.value(alt.ExprRef("paper")))
        text = base.mark_text().encode(
            text="rows:Q", color=on_dark.otherwise(alt.value(alt.ExprRef("ink")))
        )
        layers.append(text.add_params(ink, paper))
    right = sum(table.counts[index][index] for index in range(len(order)))
    total = sum(map(sum, table.counts))
    return Chart(
        name=name,
        title=title,
        spec=finish_chart(alt.layer(*layers), height=max(160, 26 * len(order))),
        text=f"A matrix of {len(order)} true and predicted classes: {right:,} of {total:,} rows"
        " are on its diagonal.",
    )


def chart_of(rows: Sequence[dict[str, Any]]) -> Any:
    """Begin a chart with its own data."""
    import altair as alt

    data: Any = alt.Data
    return alt.Chart(data(values=list(rows)))


def finish_chart(chart: Any, height: int = _HEIGHT) -> dict[str, Any]:
    """Give a chart the width of its place, and return Vega-Lite's description of it."""
    import altair as alt

    chart = chart.properties(
        width="container",
        height=height,
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
    )
    spec: dict[str, Any] = chart.to_dict(validate=False)
    # The page has a theme of its own.
    spec.pop("config", None)
    return spec


def _write(value: float) -> str:
    """Write a number for people."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.5g}"


def short(value: float) -> float:
    """Round to six digits, which is more than a picture shows."""
    return float(f"{value:.6g}")


def _describe_curves(title: str, curves: Sequence[Series], marks: Sequence[Mark]) -> str:
    sentences = []
    for curve in curves:
        if curve.is_faint:
            continue
        (first_step, first), (last_step, last) = curve.points[0], curve.points[-1]
        text = f"{curve.name}: {_write(first)}"
        if not curve.is_dashed:
            text += f" at step {first_step:,.0f}, {_write(last)} at step {last_step:,.0f}"
        sentences.append(f"{text}.")
    sentences += [f"At step {mark.step:,.0f}: {mark.text}." for mark in marks[:5]]
    return f"{title}. {' '.join(sentences)}"


def _last_values(title: str, curves: Sequence[Series]) -> Table:
    rows = []
    for curve in curves:
        if curve.is_faint or curve.is_dashed:
            continue
        values = [value for _, value in curve.points]
        low, high = min(values), max(values)
        rows.append([curve.name, *map(_write, (values[0], low, high, values[-1]))])
    head = ["curve", "first", "lowest", "highest", "last"]
    return Table(caption=f"{title}: values", head=head, rows=rows, is_folded=True)
