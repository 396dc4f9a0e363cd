"""Read a trace of ``torch.profiler``, and say of everything in it what kind of work it is.

The format is Chrome's: an object whose ``traceEvents`` have a name ``name``, a category ``cat``, a
start ``ts`` and a duration ``dur`` in microseconds, and the thread ``tid``.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.track.profiling.shares import Activity, share_out

#: The beginning of llmtune's own marks in a trace: steps, and the phases within them.
MARK = "llmtune: "
STEP_MARK = f"{MARK}step "

#: Kinds of work, in words for people.
MATMUL = "matrix products"
ATTENTION = "attention"
OPTIMIZER = "optimizer step"
COMMUNICATION = "communication"
COPIES = "copies between host and GPU"
OTHER = "other operators"
DATA = "waiting for data"
HOST = "host: Python and starting kernels"

#: Of work at the same time, arithmetic counts, then what it does not hide.
_BY_HOST, _BY_COPY, _BY_NETWORK, _BY_ARITHMETIC = range(4)
_NETWORK = re.compile(
    r"nccl|c10d::|gloo:|param_comms|all_?reduce|reduce_?scatter|all_?gather", re.IGNORECASE
)
_ATTENTION = re.compile(r"flash|fmha|attention|\bmha_", re.IGNORECASE)
_MATMUL = re.compile(
    r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitk"
    r"|aten::_?(addmm|mm|bmm|baddbmm|addbmm|int_mm|matmul|linear|grouped_mm|scaled_mm)\b|mkldnn",
    re.IGNORECASE,
)
_BETWEEN_HOST = re.compile(r"memcpy.*(HtoD|DtoH)", re.IGNORECASE)
#: Categories of a GPU's own work, and of the calls that start it.
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_STARTS = ("cuda_runtime", "cuda_driver")
#: The optimizer's phase, and that in which the rows of a step are waited for.
_STEP_PHASE, _DATA_PHASE = "step", "data"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceShares:
    """The time of the traced steps, all in seconds per step."""

    steps: int
    seconds: float
    """The length of a step."""
    on_device: bool
    """Tell whether a GPU worked; else the host did all."""
    categories: Mapping[str, float]
    operators: Sequence[tuple[str, str, float]]
    """Name, category and time of each, the longest first."""


def read_events(file: Path) -> list[dict[str, Any]]:
    """Read the events of a trace that is packed with gzip.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no trace.
    """
    with gzip.open(file, "rb") as stream:
        events = json.load(stream)["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def measure_trace(events: Sequence[Mapping[str, Any]]) -> TraceShares | None:
    """Share the traced steps out among kinds of work and operators; None without a step."""
    marks = [event for event in events if _is_mark(event)]
    windows = [_span(event) for event in marks if event["name"].startswith(STEP_MARK)]
    if not windows:
        return None
    on_device = any(event["cat"] in _ON_DEVICE for event in events if "cat" in event)
    phases = [event for event in marks if not event["name"].startswith(STEP_MARK)]
    activities = [
        *(_host_activity(event) for event in marks),
        *(_device_activities(events, phases) if on_device else _host_operators(events, phases)),
    ]
    found = sorted(share_out(activities, windows).items(), key=lambda item: -item[1])
    scale = 1e-6 / len(windows)
    categories: dict[str, float] = {}
    for (category, _), time in found:
        categories[category] = categories.get(category, 0.0) + time * scale
    operators = [
        (name, category, time * scale)
        for (category, name), time in found
        if not name.startswith(MARK)
    ]
    return TraceShares(
        steps=len(windows),
        seconds=sum(end - start for start, end in windows) * scale,
        on_device=on_device,
        categories=dict(sorted(categories.items(), key=lambda item: -item[1])),
        operators=operators,
    )


def classify(name: str, phase: str | None) -> str:
    """Find the kind of work of a kernel or an operator.

    Args:
        phase: The phase of the step in which it was started.
    """
    if _NETWORK.search(name):
        return COMMUNICATION
    if _BETWEEN_HOST.search(name):
        return COPIES
    if phase == _STEP_PHASE:
        return OPTIMIZER
    if _ATTENTION.search(name):
        return ATTENTION
    return MATMUL if _MATMUL.search(name) else OTHER


def _is_mark(event: Mapping[str, Any]) -> bool:
    return event.get("cat") == "user_annotation" and str(event["name"]).startswith(MARK)


def _span(event: Mapping[str, Any]) -> tuple[float, float]:
    start = float(event["ts"])
    return start, start + float(event.get("dur", 0))


def _phase_of(mark: Mapping[str, Any]) -> str:
    return str(mark["name"]).removeprefix(MARK)


def _host_activity(mark: Mapping[str, Any]) -> Activity:
    """Say what a moment is in which nothing else is known to work: the host's, in a phase."""
    start, end = _span(mark)
    kinds = {_DATA_PHASE: DATA, _STEP_PHASE: OPTIMIZER}
    category = kinds.get(_phase_of(mark), HOST)
    return Activity(start=start, end=end, level=_BY_HOST, category=category, name=str(mark["name"]))


class _Phases:
    """Finds the phase of a moment."""

    def __init__(self, marks: Sequence[Mapping[str, Any]]):
        self._spans = sorted((*_span(mark), _phase_of(mark)) for mark in marks)

    def at(self, moments: Sequence[float]) -> list[str | None]:
        """Return the phases of moments, which are in order."""
        found: list[str | None] = []
        place = 0
        for moment in moments:
            while place < len(self._spans) and self._spans[place][1] <= moment:
                place += 1
            inside = place < len(self._spans) and self._spans[place][0] <= moment
            found.append(self._spans[place][2] if inside else None)
        return found


def _device_activities(
    events: Sequence[Mapping[str, Any]], marks: Sequence[Mapping[str, Any]]
) -> Iterator[Activity]:
    """Yield the work of a GPU; its phase is that in which the host started it."""
    started = {
        event["args"]["correlation"]: float(event["ts"])
        for event in events
        if event.get("cat") in _STARTS and "correlation" in event.get("args", {})
    }
    work = [event for event in events if event.get("cat") in _ON_DEVICE]
    begun = [
        started.get(event.get("args", {}).get("correlation"), float(event["ts"])) for event in work
    ]
    order = sorted(range(len(work)), key=begun.__getitem__)
    phases = _Phases(marks).at([begun[number] for number in order])
    for number, phase in zip(order, phases, strict=True):
        event = work[number]
        category = classify(str(event["name"]), phase)
        levels = {COMMUNICATION: _BY_NETWORK, COPIES: _BY_COPY}
        yield _to_activity(event, category, levels.get(category, _BY_ARITHMETIC))


def _host_operators(
    events: Sequence[Mapping[str, Any]], marks: Sequence[Mapping[str, Any]]
) -> Iterator[Activity]:
    """Yield the operators of the thread that trains, and the communication of all threads."""
    threads = {mark["tid"] for mark in marks}
    work = sorted(
        (event for event in events if event.get("cat") in ("cpu_op", "user_annotation")),
        key=lambda event: float(event["ts"]),
    )
    phases = _Phases(marks).at([float(event["ts"]) for event in work])
    for event, phase in zip(work, phases, strict=True):
        category = classify(str(event["name"]), phase)
        if category == COMMUNICATION:
            yield _to_activity(event, category, _BY_NETWORK)
        elif event["cat"] == "cpu_op" and event["tid"] in threads:
            yield _to_activity(event, category, _BY_ARITHMETIC)


def _to_activity(event: Mapping[str, Any], category: str, level: int) -> Activity:
    start, end = _span(event)
    return Activity(start=start, end=end, level=level, category=category, name=str(event["name"]))
