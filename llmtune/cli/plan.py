"""``plan``: predict memory and speed of every placement, on this machine or a named one.

No weight is loaded and no run folder is made.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmtune.cli.arguments import Options
from llmtune.cli.output import Output, stdout_for_us
from llmtune.config.composed import Composed
from llmtune.errors import EXIT_DONE, DoesNotFitError
from llmtune.plan.advice import Advice, describe_misfit, list_advice
from llmtune.plan.ladder import Candidate, Ladder, Rung
from llmtune.plan.length.batch_schedule import BatchSchedule
from llmtune.plan.length.duration import Duration, predict_duration
from llmtune.plan.memory.peak_memory import USABLE_SHARE
from llmtune.plan.resolve import resolve_ladder
from llmtune.run.adapter import adopt_adapter
from llmtune.run.task import adopt_task
from llmtune.security.terminal import to_json_line
from llmtune.track.console import Console
from llmtune.track.status import Status
from llmtune.units import counted, format_bytes, format_count, format_seconds

#: Letters of the column that says why, where the terminal has fewer columns.
_LEAST_OF_REASON = 24


def run(composed: Composed, options: Options) -> int:
    """Print the ladder; the exit code is 3 if no rung fits."""
    with stdout_for_us() as write:
        return _plan(composed, options, write)


def _plan(composed: Composed, options: Options, write: Output) -> int:
    with Status(Console(sys.stderr), "loading the libraries and planning"):
        result = make_plan(composed)
    if options.as_json:
        write(to_json_line(result.to_json(), indent=1) + "\n")
        return EXIT_DONE if result.fits else DoesNotFitError.exit_code
    write(str(result))
    if result.misfit:
        raise DoesNotFitError(result.misfit)
    return EXIT_DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanResult:
    """A job as the plan foresees it."""

    composed: Composed
    """The configuration that was planned."""
    ladder: Ladder
    """All placements, with their memory in bytes and their speed in tokens per second."""
    advice: tuple[Advice, ...]
    """Changes that would save memory, and change the result."""
    misfit: str | None
    """None where a placement fits; else the reasons why none does."""

    @property
    def fits(self) -> bool:
        """Tell whether a placement fits."""
        return self.chosen is not None

    @property
    def chosen(self) -> Candidate | None:
        """Return the fastest placement that fits."""
        return self.ladder.chosen

    def to_json(self) -> dict[str, Any]:
        """Return the result as ``plan --json`` prints it."""
        return _to_json(self.composed, self.ladder, self.advice, self.misfit)

    def __str__(self) -> str:
        """Return the result as ``plan`` prints it."""
        return _to_text(self.composed, self.ladder, self.advice)


def make_plan(composed: Composed) -> PlanResult:
    """Plan a job.

    Raises:
        LlmtuneError: The job cannot be planned; one that does not fit can.
    """
    composed = adopt_task(adopt_adapter(composed))
    ladder = resolve_ladder(composed.config, planning=True)
    return PlanResult(
        composed=composed,
        ladder=ladder,
        advice=tuple(list_advice(composed.config, ladder)),
        misfit=describe_misfit(composed.config, ladder) if ladder.chosen is None else None,
    )


def _to_json(
    composed: Composed, ladder: Ladder, advice: Sequence[Advice], misfit: str | None
) -> dict[str, Any]:
    """Return the ladder as plain values.

    Bytes of a GPU are one rank's; host, NVMe and what is written are one machine's.
    """
    config, chosen = composed.config, ladder.chosen
    found: dict[str, Any] = {
        "fits": chosen is not None,
        "chosen": chosen.placement.rung if chosen else None,
        "zero_stage": chosen.placement.zero_stage if chosen else None,
        "refusals": list(ladder.refusals),
        "advice": [asdict(item) for item in advice],
        "model": {
            "name_or_path": config.model.name_or_path,
            "parameters": ladder.shape.parameters,
            "trainable_parameters": ladder.shape.trainable_parameters,
        },
        "hardware": asdict(ladder.hardware),
        "world_size": ladder.world_size,
        "usable_share": USABLE_SHARE,
        "precision": config.precision.value,
        "max_seq_length": config.data.max_seq_length,
        "rows": describe_rows(composed),
        "global_batch_size": ladder.rows.global_batch_size,
        "activations": ladder.activations_origin,
        "rungs": [_rung_to_json(rung, ladder) for rung in ladder.rungs],
    }
    if chosen is not None:
        found["duration"] = _duration(composed, ladder).to_dict()
    if config.train.batch_schedule is not None:
        found["batch_schedule"] = config.train.batch_schedule
        found["batch_schedule_unit"] = config.train.batch_schedule_unit.value
    if misfit:
        found["message"] = misfit
    return found


def _rung_to_json(rung: Rung, ladder: Ladder) -> dict[str, Any]:
    candidate = rung.candidate
    if candidate is None:
        return {"name": rung.name, "fits": False, "reason": rung.reason}
    memory, on_node = candidate.memory, ladder.cluster.ranks_on_node
    found = {
        "name": rung.name,
        "fits": candidate.fits,
        "reason": rung.reason,
        "zero_stage": candidate.placement.zero_stage,
        "per_gpu_bytes": {**asdict(memory.device), "total": memory.device.total},
        "host_bytes": host_bytes(rung, ladder),
        "host_bytes_per_rank": {**asdict(memory.host), "total": memory.host.total},
        "nvme_bytes": memory.nvme * on_node,
        "nvme_bytes_written_per_step": memory.nvme_written_per_step * on_node,
        "checkpoint_bytes": memory.checkpoint,
        "tokens_per_second": candidate.speed.tokens_per_second,
        "step_seconds": candidate.speed.step_seconds,
        "bound_by": candidate.speed.bound_by,
        "seconds": candidate.speed.terms,
        "per_device_train_batch_size": candidate.batch.micro_batch_size,
        "gradient_accumulation_steps": candidate.batch.accumulation_steps,
        "gradient_checkpointing": candidate.recomputed.count > 0,
        "recomputed_layers": candidate.recomputed.count,
    }
    if ladder.schedule.grows:
        found["batch_schedule"] = [
            {
                "start": start,
                "rows": rows,
                "gradient_accumulation_steps": candidate.batch.resized(rows).accumulation_steps,
                "step_seconds": candidate.speed_by_rows[rows].step_seconds,
            }
            for start, rows in ladder.schedule.entries
        ]
    return found


def host_bytes(rung: Rung, ladder: Ladder) -> int:
    """Return the host memory of one machine, in bytes; on a CPU, with the accelerator's share."""
    assert rung.candidate is not None
    memory = rung.candidate.memory
    device = memory.device.total if ladder.hardware.accelerator == "cpu" else 0
    return (memory.host.total + device) * ladder.cluster.ranks_on_node


def describe_rows(composed: Composed) -> str:
    """Describe the length of the rows, and where it comes from if no data is named."""
    length = f"rows of {composed.config.data.max_seq_length} tokens"
    if "data" not in composed.unnamed:
        return length
    if composed.choices["data"] == "stdlib_docs":
        return f"{length} (the default job's: no model and no data is named)"
    return f"{length} (no data is named; data.max_seq_length= plans for others)"


def _to_text(composed: Composed, ladder: Ladder, advice: Sequence[Advice]) -> str:
    """Return the table of rungs, the reasons, and the advice."""
    config, shape, hardware = composed.config, ladder.shape, ladder.hardware
    cpu = hardware.accelerator == "cpu"
    rungs = _render_rungs(ladder)
    lines = [
        (
            f"{config.model.name_or_path}: {format_count(shape.parameters)} parameters,"
            f" {config.tuner.kind} trains {format_count(shape.trainable_parameters)};"
            f" {config.precision.value}, {describe_rows(composed)},"
            f" {ladder.schedule.describe()}"
        ),
        (
            f"{hardware.describe()}; {counted(ladder.world_size, 'rank')}; a plan fills"
            f" {USABLE_SHARE:.0%} of a memory at the most"
        ),
        *ladder.notes,
        "",
        rungs,
        "",
    ]
    if ladder.chosen is not None:
        device = ladder.chosen.memory.device
        parts = {name: value for name, value in asdict(device).items() if value}
        where = "per rank" if cpu else "per GPU"
        lines.append(f"-> {ladder.chosen.describe()}")
        lines.append(
            f"   {where}: "
            + ", ".join(f"{name} {format_bytes(value)}" for name, value in parts.items())
        )
        written = ladder.chosen.memory.nvme_written_per_step * ladder.cluster.ranks_on_node
        if written:
            lines.append(
                f"   NVMe: {format_bytes(written)} written per step, {format_bytes(1000 * written)}"
                " in 1,000 steps"
            )
        lines += _describe_copies(config.checkpoint.background, ladder)
        seconds = ladder.chosen.speed
        lines.append(
            f"   a step of full rows: {_describe_time(seconds.step_seconds)}, bound by"
            f" {seconds.bound_by}"
        )
        lines.append(f"   {_duration(composed, ladder).describe(hardware.accelerator)}")
        lines += _describe_sizes(ladder.chosen, ladder.schedule)
    if ladder.activations_origin != "traced":
        lines.append(
            "   activations are a rough estimate, because this architecture could not be traced"
        )
    if ladder.refusals:
        lines += ["", "would not be trained here:", *(f"   {reason}" for reason in ladder.refusals)]
    if advice:
        lines += ["", "would change the result, and is never done by itself:"]
        lines += [_advice_line(item) for item in advice]
    return "\n".join(lines) + "\n"


def _duration(composed: Composed, ladder: Ladder) -> Duration:
    """Predict how long the run takes on the chosen rung."""
    assert ladder.chosen is not None
    config, speed = composed.config, ladder.chosen.speed
    return predict_duration(
        speed.tokens_per_second,
        ladder.world_size,
        config.hardware.gpu_hour_price,
        config.train.max_steps,
        speed.tokens_per_second * speed.step_seconds,
    )


def _describe_copies(background: bool | str, ladder: Ladder) -> list[str]:
    """Describe what checkpoints take of one machine's memory while they are written."""
    assert ladder.chosen is not None
    if not background:
        return []
    copies = format_bytes(ladder.chosen.memory.checkpoint // ladder.hardware.nodes)
    if background == "auto":
        return [
            f"   checkpoints: copied to {copies} of host memory where they are free, and written"
            " while training goes on; not counted above"
        ]
    return [
        f"   checkpoints: copied to {copies} of host memory (checkpoint.background=true), and"
        " written while training goes on; not counted above"
    ]


def _describe_sizes(candidate: Candidate, schedule: BatchSchedule) -> list[str]:
    """Describe the steps of each size of ``train.batch_schedule``; nothing without one."""
    if not schedule.grows:
        return []
    lines = ["   that is the mean over train.max_steps, or a step of the last size without it"]
    for start, rows in schedule.entries:
        seconds = _describe_time(candidate.speed_by_rows[rows].step_seconds)
        batch = candidate.batch.resized(rows)
        lines.append(
            f"   after {schedule.describe_start(start)}: {batch.describe()}, {seconds} a step"
        )
    return lines


def _render_rungs(ladder: Ladder) -> str:
    """Render the table of rungs, as wide as the terminal, with long lines broken."""
    import io

    from rich.console import Console
    from rich.table import Table

    def make(*last: str) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("rung", no_wrap=True)
        place = "per rank" if ladder.hardware.accelerator == "cpu" else "per GPU"
        for column in ("ZeRO", "micro", "ckpt", place, "host", "NVMe", "checkpoint", "tokens/s"):
            table.add_column(column, justify="right", no_wrap=True)
        for name in last:
            table.add_column(name, overflow="fold")
        for rung in ladder.rungs:
            table.add_row(*_row(rung, ladder)[: len(table.columns)])
        return table

    stream = io.StringIO()
    console = Console(file=stream, width=1000, highlight=False, no_color=True)
    numbers = console.measure(make()).maximum
    console.width = max(numbers + 2 + _LEAST_OF_REASON, min(160, _terminal_width()))
    console.print(make("why"))
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())


def _row(rung: Rung, ladder: Ladder) -> list[str]:
    candidate = rung.candidate
    mark = "*" if candidate is not None and candidate is ladder.chosen else " "
    if candidate is None:
        return [f"{mark} {rung.name}", *["-"] * 8, rung.reason]
    memory = candidate.memory
    nvme = memory.nvme * ladder.cluster.ranks_on_node
    return [
        f"{mark} {rung.name}",
        str(candidate.placement.zero_stage),
        str(candidate.batch.micro_batch_size),
        candidate.recomputed.describe().removesuffix(" layers"),
        format_bytes(memory.device.total),
        format_bytes(host_bytes(rung, ladder)),
        format_bytes(nvme) if nvme else "-",
        format_bytes(memory.checkpoint),
        f"{candidate.speed.tokens_per_second:,.0f}",
        rung.reason,
    ]


def _advice_line(item: Advice) -> str:
    override = f" ({item.override})" if item.override else " (not an option of llmtune yet)"
    return (
        f"   {item.change}: saves {format_bytes(item.saves_bytes)} of a rank's"
        f" {item.where}{override}"
    )


def _describe_time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 120 else format_seconds(seconds)


def _terminal_width() -> int:
    try:
        return os.get_terminal_size(2).columns
    except OSError:
        return 132
