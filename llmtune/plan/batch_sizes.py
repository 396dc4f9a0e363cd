"""Rows of an optimizer step, of a micro-batch, and how many micro-batches are accumulated: any two
settle the third.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmtune.config.schema import TrainConfig
from llmtune.errors import ConfigError
from llmtune.units import counted

#: ``auto`` fills a micro-batch up to this many tokens; more rarely makes a GPU faster and always
#: costs activations. A CPU gains nothing from large micro-batches and loses what they pad
#: (SmolLM2-135M on 2 cores: 354 tokens/s at 2 rows, 316 at 8).
AUTO_MICRO_BATCH_TOKENS = {"cuda": 32768, "cpu": 1024}

#: ``train.global_batch_size=auto`` is at least this.
AUTO_GLOBAL_BATCH_ROWS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """``global_batch_size == micro_batch_size * accumulation_steps * world_size``, always."""

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    world_size: int

    def describe(self) -> str:
        """The arithmetic, for the page before step 1."""
        return (
            f"{self.global_batch_size} rows = {self.micro_batch_size} a micro-batch x "
            f"{self.accumulation_steps} accumulated x {counted(self.world_size, 'rank')}"
        )


@dataclass(frozen=True, slots=True)
class StepRows:
    """What is settled of a step before memory and speed are looked at; ``global_batch_size``
    divides among the ranks.
    """

    global_batch_size: int
    micro_batch_size: int | None
    """None where the ladder chooses it."""
    origin: str | None
    """Where ``train.global_batch_size=auto`` came from; None where the user set it."""


def settle_batch(train: TrainConfig, world_size: int, begun: TrainConfig | None = None) -> StepRows:
    """Fill in what ``auto`` leaves open, but for the micro-batch where nothing says how large it
    is.

    Args:
        begun: What the run was started with, where it goes on. Its ``global_batch_size`` stays,
            whatever the ranks, for a step of other rows would be another training.

    Raises:
        ConfigError: The numbers contradict each other, or do not divide among the ranks.
    """
    rows, micro = _number(train.global_batch_size), _number(train.per_device_train_batch_size)
    accumulation = _number(train.gradient_accumulation_steps)
    origin = None
    if rows is None:
        typed = (train.per_device_train_batch_size, train.gradient_accumulation_steps)
        unchanged = begun is not None and typed == (
            begun.per_device_train_batch_size,
            begun.gradient_accumulation_steps,
        )
        kept = _number(begun.global_batch_size) if begun is not None else None
        if kept is not None and (unchanged or micro is None or accumulation is None):
            return _keep(kept, micro, accumulation, world_size, unchanged)
        rows, origin = _derive(micro, accumulation, world_size)
    _check_ranks(rows, world_size)
    return StepRows(rows, _settle_micro(rows, micro, accumulation, world_size), origin)


def batch_options(
    train: TrainConfig,
    world_size: int,
    max_seq_length: int,
    accelerator: str,
    begun: TrainConfig | None = None,
) -> list[BatchPlan]:
    """Every way to reach the global batch that the config leaves open, largest micro-batch first.

    Raises:
        As :func:`settle_batch`.
    """
    settled = settle_batch(train, world_size, begun)
    rows, per_rank = settled.global_batch_size, settled.global_batch_size // world_size
    sizes = [settled.micro_batch_size] if settled.micro_batch_size is not None else []
    if not sizes:
        limit = max(1, AUTO_MICRO_BATCH_TOKENS[accelerator] // max_seq_length)
        sizes = [size for size in reversed(_divisors(per_rank)) if size <= limit]
    return [
        BatchPlan(
            global_batch_size=rows,
            micro_batch_size=size,
            accumulation_steps=per_rank // size,
            world_size=world_size,
        )
        for size in sizes
    ]


def _derive(micro: int | None, accumulation: int | None, world_size: int) -> tuple[int, str]:
    """``train.global_batch_size=auto`` of a new run, and where it came from."""
    unit = world_size * (micro or 1) * (accumulation or 1)
    if micro and accumulation:
        return (
            unit,
            (
                f"rows a step: {unit}, train.per_device_train_batch_size={micro} x "
                f"train.gradient_accumulation_steps={accumulation} x {counted(world_size, 'rank')}"
            ),
        )
    rows = math.ceil(AUTO_GLOBAL_BATCH_ROWS / unit) * unit
    factors = [counted(world_size, "rank")]
    factors += [f"micro-batches of {micro}"] if micro else []
    factors += [f"{accumulation} accumulated micro-batches"] if accumulation else []
    return (
        rows,
        (
            f"rows a step: {rows}, the smallest number from {AUTO_GLOBAL_BATCH_ROWS} on for"
            f" {' and '.join(factors)}"
        ),
    )


def _keep(
    rows: int, micro: int | None, accumulation: int | None, world_size: int, unchanged: bool
) -> StepRows:
    """The rows of a run that goes on.

    Args:
        unchanged: The command is that of the first start: its micro-batch or accumulation was for
            the ranks of then, and gives way. What was set since must divide as ever.
    """
    if rows % world_size:
        raise ConfigError(
            f"the run began with train.global_batch_size={rows}, which it keeps and which does not"
            f" divide among {world_size} ranks: go on with one of {_divisors(rows)} ranks, or begin"
            " another run with run_name= or output_dir="
        )
    per_rank = rows // world_size
    if unchanged and micro is not None:
        micro = max(size for size in _divisors(per_rank) if size <= micro)
    elif unchanged and accumulation is not None:
        micro = per_rank // max(size for size in _divisors(per_rank) if size <= accumulation)
    else:
        micro = _settle_micro(rows, micro, accumulation, world_size)
    return StepRows(rows, micro, f"rows a step: {rows}, as the run began")


def _settle_micro(
    rows: int, micro: int | None, accumulation: int | None, world_size: int
) -> int | None:
    rows_per_rank = rows // world_size
    if micro is not None and accumulation is not None:
        if micro * accumulation != rows_per_rank:
            raise ConfigError(
                f"train.per_device_train_batch_size={micro} x"
                f" train.gradient_accumulation_steps={accumulation} x {counted(world_size, 'rank')}"
                f" are {micro * accumulation * world_size} rows, not"
                f" train.global_batch_size={rows}: leave one of the three to auto"
            )
    elif accumulation is not None:
        _check_divides(
            "train.gradient_accumulation_steps", accumulation, rows, rows_per_rank, world_size
        )
        return rows_per_rank // accumulation
    elif micro is not None:
        _check_divides("train.per_device_train_batch_size", micro, rows, rows_per_rank, world_size)
    return micro


def _check_ranks(rows: int, world_size: int) -> None:
    if rows % world_size:
        near = [
            size
            for size in (rows - rows % world_size, rows - rows % world_size + world_size)
            if size
        ]
        raise ConfigError(
            f"train.global_batch_size={rows} does not divide among {world_size} ranks: "
            f"take {' or '.join(map(str, near))}, or auto"
        )


def _check_divides(key: str, value: int, rows: int, rows_per_rank: int, world_size: int) -> None:
    if rows_per_rank % value:
        raise ConfigError(
            f"{key}={value} does not divide the {rows_per_rank} rows of a rank"
            f" (train.global_batch_size={rows}, {world_size} ranks): one of"
            f" {_divisors(rows_per_rank)}, or auto; or train.global_batch_size=auto"
        )


def _divisors(number: int) -> list[int]:
    # Up to the root: somebody may ask for a billion.
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _number(value: int | str) -> int | None:
    """None for ``auto``."""
    return value if isinstance(value, int) else None
