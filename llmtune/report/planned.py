"""Compare the plan of a run with what happened, and sum up where its time went."""

from __future__ import annotations

import statistics

from llmtune.report.run_facts import RunFacts
from llmtune.track.phase_seconds import KEYS, PHASES, Comparison
from llmtune.units import format_bytes


def planned_memory_bytes(facts: RunFacts) -> float | None:
    """Return the planned peak of a rank: of its accelerator, or on a CPU of the host.

    Returns:
        None where ``plan.json`` does not say.
    """
    memory, hardware = facts.record.memory, facts.record.hardware
    if memory is None or hardware is None or not memory.device.total:
        return None
    on_host = memory.host.total if hardware.accelerator == "cpu" else 0
    return float(memory.device.total + on_host)


def measured_speed(facts: RunFacts) -> float | None:
    """Return the median of the steps' tokens per second; the first step of several is left out."""
    return _median_behind_first(facts, "tokens_per_second")


def measured_step_seconds(facts: RunFacts) -> float | None:
    """Return the median of the steps' seconds; the first step of several is left out."""
    return _median_behind_first(facts, "seconds")


def largest_memory_bytes(facts: RunFacts) -> float | None:
    """Return the largest memory that a step recorded."""
    return max(facts.metrics.get("memory_bytes").values, default=None)


def _median_behind_first(facts: RunFacts, key: str) -> float | None:
    values = facts.metrics.get(key).values
    return statistics.median(values[1:] or values) if len(values) else None


def compare(facts: RunFacts) -> list[list[str]]:
    """List what was planned and what happened, with the ratio of both.

    A row is a name, the planned number, the measured one, and measured / planned.
    """
    rows = []
    memory, used = planned_memory_bytes(facts), largest_memory_bytes(facts)
    if memory is not None and used is not None:
        compared = Comparison(planned=memory, measured=used)
        name = "memory of a rank at its peak"
        rows.append([name, format_bytes(memory), format_bytes(used), f"{compared.ratio:.2f}"])
    planned, speed = facts.record.tokens_per_second, measured_speed(facts)
    if planned and speed is not None:
        compared = Comparison(planned=planned, measured=speed)
        name = "tokens per second (planned for full rows, median)"
        rows.append([name, f"{planned:,.0f}", f"{speed:,.0f}", f"{compared.ratio:.2f}"])
    tokens, seconds = _median_behind_first(facts, "tokens"), measured_step_seconds(facts)
    if planned and tokens and seconds is not None:
        compared = Comparison(planned=tokens / planned, measured=seconds)
        name = f"seconds per step (of {tokens:,.0f} tokens, median)"
        rows.append([name, f"{tokens / planned:.3g}", f"{seconds:.3g}", f"{compared.ratio:.2f}"])
    steps = facts.record.steps
    if steps is not None and steps.total_steps and facts.metrics.last_step is not None:
        share = facts.metrics.last_step / steps.total_steps
        rows.append(
            ["steps", f"{steps.total_steps:,}", f"{facts.metrics.last_step:,}", f"{share:.2f}"]
        )
    return rows


def seconds_by_phase(facts: RunFacts) -> list[tuple[str, float]]:
    """List the phases with their seconds, the longest first.

    They are those of the last start once it has ended by itself; before that, the sums of the
    lines of ``metrics.jsonl``.
    """
    seconds = facts.seconds or {
        phase: sum(facts.metrics.get(key).values) for phase, key in KEYS.items()
    }
    found = [(PHASES[phase], value) for phase, value in seconds.items() if phase in PHASES]
    whole = sum(value for _, value in found)
    return sorted((item for item in found if item[1] > whole / 1000), key=lambda item: -item[1])
