"""Rows per optimizer step, rows per micro-batch and accumulation steps: any two give the third."""

import math
from dataclasses import dataclass

from llmtune.config.groups.train import TrainConfig
from llmtune.errors import ConfigError
from llmtune.units import counted

#: ``auto`` fills a micro-batch up to this many tokens. More rarely make a GPU faster, and always
#: cost activations. A CPU gains nothing from large micro-batches and loses what they pad
#: (SmolLM2-135M on 2 cores: 354 tokens/s at 2 rows, 316 at 8).
AUTO_MICRO_BATCH_TOKENS = {"cuda": 32768, "cpu": 1024}

#: The least value of ``train.global_batch_size=auto``.
AUTO_GLOBAL_BATCH_ROWS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """``global_batch_size == micro_batch_size * accumulation_steps * world_size``, always."""

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    world_size: int

    def describe(self) -> str:
        """Describe the arithmetic, for the page before step 1."""
        return (
            f"{self.global_batch_size} rows = {self.micro_batch_size} per micro-batch x "
            f"{self.accumulation_steps} accumulated x {counted(self.world_size, 'rank')}"
        )


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step before memory and speed are estimated; they divide among the ranks."""

    global_batch_size: int
    micro_batch_size: int | None
    """None if the ladder chooses it."""
    origin: str | None
    """Origin of ``train.global_batch_size=auto``; None if the user set it."""


def resolve_batch(
    train: TrainConfig, world_size: int, begun: TrainConfig | None = None
) -> StepRows:
    """Resolve the values that are ``auto``; the micro-batch size may stay open.

    Args:
        begun: The settings that the run was started with, where it is resumed. Its
            ``global_batch_size`` stays, whatever the ranks, because steps of other rows would be
            another training.

    Raises:
        ConfigError: The values contradict each other, or do not divide among the ranks.
    """
    rows = _set_value(train.global_batch_size)
    micro_batch_size = _set_value(train.per_device_train_batch_size)
    accumulation_steps = _set_value(train.gradient_accumulation_steps)
    origin = None
    if rows is None:
        typed = (train.per_device_train_batch_size, train.gradient_accumulation_steps)
        unchanged = begun is not None and typed == (
            begun.per_device_train_batch_size,
            begun.gradient_accumulation_steps,
        )
        kept = _set_value(begun.global_batch_size) if begun is not None else None
        is_open = micro_batch_size is None or accumulation_steps is None
        if kept is not None and (unchanged or is_open):
            return _keep(kept, micro_batch_size, accumulation_steps, world_size, unchanged)
        rows, origin = _derive(micro_batch_size, accumulation_steps, world_size)
    _check_ranks(rows, world_size)
    micro_batch_size = _resolve_micro_batch_size(
        rows, micro_batch_size, accumulation_steps, world_size
    )
    return StepRows(rows, micro_batch_size, origin)


def batch_options(
    train: TrainConfig,
    world_size: int,
    max_seq_length: int,
    accelerator: str,
    begun: TrainConfig | None = None,
) -> list[BatchPlan]:
    """List all ways to reach the global batch size that are open, largest micro-batch first.

    Raises:
        The errors of :func:`resolve_batch`.
    """
    settled = resolve_batch(train, world_size, begun)
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


def _derive(
    micro_batch_size: int | None, accumulation_steps: int | None, world_size: int
) -> tuple[int, str]:
    """Derive ``train.global_batch_size=auto`` of a new run, and name its origin."""
    ranks = counted(world_size, "rank")
    unit = world_size * (micro_batch_size or 1) * (accumulation_steps or 1)
    if micro_batch_size and accumulation_steps:
        product = (
            f"train.per_device_train_batch_size={micro_batch_size} x"
            f" train.gradient_accumulation_steps={accumulation_steps} x {ranks}"
        )
        return unit, f"rows per step: {unit}, {product}"
    rows = math.ceil(AUTO_GLOBAL_BATCH_ROWS / unit) * unit
    factors = [ranks]
    if micro_batch_size:
        factors.append(f"micro-batches of {micro_batch_size}")
    if accumulation_steps:
        factors.append(f"{accumulation_steps} accumulated micro-batches")
    least = f"the smallest number from {AUTO_GLOBAL_BATCH_ROWS} on for {' and '.join(factors)}"
    return rows, f"rows per step: {rows}, {least}"


def _keep(
    rows: int,
    micro_batch_size: int | None,
    accumulation_steps: int | None,
    world_size: int,
    unchanged: bool,
) -> StepRows:
    """Keep the rows of a run that is resumed.

    Args:
        unchanged: The command is that of the first start. Its micro-batch size or accumulation was
            for the ranks of that time, and is adapted; values set since must divide the rows.
    """
    if rows % world_size:
        raise ConfigError(
            f"the run began with train.global_batch_size={rows}, which it keeps and which does not"
            f" divide among {world_size} ranks: resume with one of {_divisors(rows)} ranks, or"
            " begin another run with run_name= or output_dir="
        )
    per_rank = rows // world_size
    if unchanged and micro_batch_size is not None:
        micro_batch_size = max(size for size in _divisors(per_rank) if size <= micro_batch_size)
    elif unchanged and accumulation_steps is not None:
        micro_batch_size = per_rank // max(
            size for size in _divisors(per_rank) if size <= accumulation_steps
        )
    else:
        micro_batch_size = _resolve_micro_batch_size(
            rows, micro_batch_size, accumulation_steps, world_size
        )
    return StepRows(rows, micro_batch_size, f"rows per step: {rows}, as the run began")


def _resolve_micro_batch_size(
    rows: int, micro_batch_size: int | None, accumulation_steps: int | None, world_size: int
) -> int | None:
    rows_per_rank = rows // world_size
    if micro_batch_size is not None and accumulation_steps is not None:
        product = micro_batch_size * accumulation_steps
        if product != rows_per_rank:
            raise ConfigError(
                f"train.per_device_train_batch_size={micro_batch_size} x"
                f" train.gradient_accumulation_steps={accumulation_steps} x"
                f" {counted(world_size, 'rank')} are {product * world_size} rows, not"
                f" train.global_batch_size={rows}: leave one of the three to auto"
            )
    elif accumulation_steps is not None:
        _check_divides(
            "train.gradient_accumulation_steps", accumulation_steps, rows, rows_per_rank, world_size
        )
        return rows_per_rank // accumulation_steps
    elif micro_batch_size is not None:
        _check_divides(
            "train.per_device_train_batch_size", micro_batch_size, rows, rows_per_rank, world_size
        )
    return micro_batch_size


def _check_ranks(rows: int, world_size: int) -> None:
    if rows % world_size:
        below = rows - rows % world_size
        near = [size for size in (below, below + world_size) if size]
        raise ConfigError(
            f"train.global_batch_size={rows} does not divide among {world_size} ranks: "
            f"take {' or '.join(map(str, near))}, or auto"
        )


def _check_divides(key: str, value: int, rows: int, rows_per_rank: int, world_size: int) -> None:
    if rows_per_rank % value:
        raise ConfigError(
            f"{key}={value} does not divide the {rows_per_rank} rows per rank"
            f" (train.global_batch_size={rows}, {world_size} ranks): one of"
            f" {_divisors(rows_per_rank)}, or auto; or train.global_batch_size=auto"
        )


def _divisors(value: int) -> list[int]:
    # Only up to the square root, because the value may be a billion.
    small = [size for size in range(1, math.isqrt(value) + 1) if value % size == 0]
    return sorted({*small, *(value // size for size in small)})


def _set_value(value: int | str) -> int | None:
    """Return the value that the user set; None for ``auto``."""
    return value if isinstance(value, int) else None
