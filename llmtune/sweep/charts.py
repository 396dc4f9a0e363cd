"""Charts of a sweep: parallel coordinates of its settings, and its values trial by trial.

As in :mod:`llmtune.report.charts`, names are values of the data and never names of fields.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.report.charts import chart_of, finish_chart, short
from llmtune.report.page import Chart
from llmtune.sweep.objective import Objective
from llmtune.sweep.space import Parameter, Scalar, show
from llmtune.sweep.trial import Trial, TrialState

#: From the worst trial to the best; both can be seen on light and on dark paper.
_WORST, _BEST = "#8b949e", "#2f81f7"
_HEIGHT = 320
#: Choices that an axis writes.
_MOST_TICKS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A vertical axis, on which a value has a height from 0 to 1."""

    name: str
    ticks: Sequence[tuple[float, str]]
    """Height and text of what is written beside the axis."""
    heights: dict[int, tuple[float, str]]
    """Number of a trial -> height and text of its value."""


def list_axes(
    space: Sequence[Parameter], objective: Objective, trials: Sequence[Trial]
) -> list[Axis]:
    """List an axis for each searched key, and one for the metric.

    Args:
        trials: Finished ones, at least one.
    """
    axes = []
    for parameter in space:
        heights = {
            trial.number: _place(parameter, trial.values[parameter.key])
            for trial in trials
            if parameter.key in trial.values
        }
        edges = [_place(parameter, value) for value in parameter.edges]
        axes.append(Axis(name=parameter.key, ticks=edges[:_MOST_TICKS], heights=heights))
    values = {trial.number: trial.value for trial in trials if trial.value is not None}
    low, high = min(values.values()), max(values.values())
    span = high - low or 1.0
    axes.append(
        Axis(
            name=objective.metric,
            ticks=[((edge - low) / span, f"{edge:.5g}") for edge in dict.fromkeys((low, high))],
            heights={n: ((value - low) / span, f"{value:.6g}") for n, value in values.items()},
        )
    )
    return axes


def _place(parameter: Parameter, value: Scalar) -> tuple[float, str]:
    """Return height and text of a value on the axis of its key."""
    return _height(parameter, value), show(value)


def _height(parameter: Parameter, value: Scalar) -> float:
    if parameter.choices:
        texts = [show(choice) for choice in parameter.choices]
        place = texts.index(show(value)) if show(value) in texts else 0
        return place / (len(texts) - 1) if len(texts) > 1 else 0.5
    low, high, at = parameter.low, parameter.high, float(value or 0.0)
    if parameter.is_log:
        low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low)


def draw_parallel(
    name: str, title: str, axes: Sequence[Axis], objective: Objective, trials: Sequence[Trial]
) -> Chart:
    """Draw a line for each finished trial through its settings, colored by its value."""
    import altair as alt

    order = [axis.name for axis in axes]
    x = alt.X(
        "axis:N",
        sort=order,
        title=None,
        scale=alt.Scale(padding=0.9),
        axis=alt.Axis(labelAngle=-25, labelLimit=170, grid=False),
    )
    y = alt.Y("height:Q", scale=alt.Scale(domain=[0, 1]), axis=None)
    # By rank: one value far from the others would give all of them one color.
    color = alt.Color("rank:Q", scale=alt.Scale(range=[_BEST, _WORST]), legend=None)
    tooltip = [
        alt.Tooltip("trial:Q", title="trial"),
        alt.Tooltip("axis:N", title="key"),
        alt.Tooltip("set:N", title="value"),
        alt.Tooltip("result:Q", title=objective.metric, format=".6~g"),
    ]
    base = chart_of(_to_rows(axes, objective, trials)).encode(
        x=x, y=y, color=color, detail="trial:N"
    )
    lines = base.mark_line(strokeWidth=2, opacity=0.8)
    points = base.mark_point(filled=True, size=45, opacity=1).encode(tooltip=tooltip)
    posts = chart_of([{"axis": axis, "from": 0, "to": 1} for axis in order])
    rules = posts.mark_rule().encode(
        x=x, y=alt.Y("from:Q", scale=alt.Scale(domain=[0, 1]), axis=None), y2="to:Q"
    )
    ticks = [
        {"axis": axis.name, "height": short(height), "set": text}
        for axis in axes
        for height, text in axis.ticks
    ]
    texts = chart_of(ticks).mark_text(align="left", dx=7, fontSize=12)
    layers = [rules, lines, points, texts.encode(x=x, y=y, text="set:N")]
    return Chart(
        name=name,
        title=title,
        spec=finish_chart(alt.layer(*layers), height=_HEIGHT),
        text=f"A line for each of {len(trials)} finished trials through {', '.join(order)}, from"
        f" blue for the best ({objective.goal}) to gray for the worst. The table of trials has the"
        " same numbers.",
    )


def _to_rows(
    axes: Sequence[Axis], objective: Objective, trials: Sequence[Trial]
) -> list[dict[str, Any]]:
    """Return where the line of each trial crosses each axis; the best has rank 0."""
    values = {trial.number: trial.value or 0.0 for trial in trials}
    order = sorted(values, key=lambda number: values[number], reverse=objective.maximize)
    ranks = {number: rank for rank, number in enumerate(order)}
    return [
        {
            "axis": axis.name,
            "height": short(axis.heights[number][0]),
            "set": axis.heights[number][1],
            "trial": number,
            "result": short(value),
            "rank": ranks[number],
        }
        for axis in axes
        for number, value in values.items()
        if number in axis.heights
    ]


def draw_history(name: str, title: str, objective: Objective, trials: Sequence[Trial]) -> Chart:
    """Draw the values of trials in their order, and the best so far.

    Args:
        trials: At least one with a value.
    """
    import altair as alt

    rows, steps = [], []
    best: float | None = None
    for trial in trials:
        if trial.value is None:
            continue
        rows.append(
            {"trial": trial.number, "value": short(trial.value), "state": trial.state.value}
        )
        if trial.state is TrialState.finished:
            pick = max if objective.maximize else min
            best = trial.value if best is None else pick(best, trial.value)
            steps.append({"trial": trial.number, "value": short(best)})
    x = alt.X("trial:Q", title="trial", axis=alt.Axis(tickMinStep=1, format="d"))
    y = alt.Y(
        "value:Q",
        title=objective.metric,
        scale=alt.Scale(zero=False),
        axis=alt.Axis(format=".4~g"),
    )
    states = list(dict.fromkeys(row["state"] for row in rows))
    points = chart_of(rows).mark_point(filled=True, size=70, opacity=1)
    tooltip = [
        alt.Tooltip("trial:Q", title="trial"),
        alt.Tooltip("value:Q", title=objective.metric, format=".6~g"),
        alt.Tooltip("state:N", title="state"),
    ]
    color = alt.Color("state:N", title=None, scale=alt.Scale(domain=states))
    layers: list[Any] = [points.encode(x=x, y=y, color=color, tooltip=tooltip)]
    if steps:
        line = chart_of(steps).mark_line(interpolate="step-after", opacity=0.6)
        layers.insert(0, line.encode(x=x, y=y))
    text = f"The values of {len(rows)} trials in their order."
    if best is not None:
        text += f" The line is the best so far, {best:.6g} at the end."
    return Chart(name=name, title=title, spec=finish_chart(alt.layer(*layers)), text=text)
