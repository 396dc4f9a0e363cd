"""Rows per optimizer step, rows per micro-batch and accumulation steps: any two give the third."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llmtune.config.groups.train import TrainConfig
from llmtune.errors import ConfigError
from llmtune.units import counted

#: ``auto`` fills a micro-batch up to this many tokens. More rarely make a GPU faster, and always
#: cost activations. A CPU gains nothing from large micro-batches and loses what they pad
#: (SmolLM2-135M on 2 cores: 354 tokens/s at 2 rows, 316 at 8).
AUTO_MICRO_BATCH_TOKENS = {"cuda": 32768, "cpu": 1024}

#: The least value of ``train.global_batch_size=auto``.
AUTO_GLOBAL_BATCH_ROWS = 8


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of a job. Those of a sequence group share the tokens of the same rows."""

    world_size: int
    sequence_parallel_size: int = 1

    @property
    def groups(self) -> int:
        """Return how many groups there are, which have rows of their own."""
        return self.world_size // self.sequence_parallel_size

    def describe(self) -> str:
        """Say among whom rows are divided."""
        if self.sequence_parallel_size == 1:
            return counted(self.world_size, "rank")
        return f"{counted(self.groups, 'group')} of {self.sequence_parallel_size} ranks"

    def like(self, groups: list[int]) -> list[int]:
        """Return the ranks of so many groups."""
        return [count * self.sequence_parallel_size for count in groups]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """``global_batch_size == micro_batch_size * accumulation_steps * groups``, always."""

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    world_size: int
    sequence_parallel_size: int = 1
    """Ranks of a group, which share the tokens of its rows; 1: each rank has rows of its own."""

    @property
    def groups(self) -> int:
        """Return the number of groups, which have rows of their own."""
        return self.world_size // self.sequence_parallel_size

    def resized(self, rows: int) -> BatchPlan:
        """Return the plan of a step of other rows: the micro-batch stays, accumulation changes."""
        accumulation_steps = rows // (self.micro_batch_size * self.groups)
        return replace(self, global_batch_size=rows, accumulation_steps=accumulation_steps)

    def rank_tokens(self, row_length: int) -> int:
        """Return the tokens of a micro-batch of full rows that one rank computes."""
        return math.ceil(self.micro_batch_size * row_length / self.sequence_parallel_size)

    def describe(self) -> str:
        """Describe the arithmetic, for the page before step 1."""
        ranks = Ranks(self.world_size, self.sequence_parallel_size).describe()
        return (
            f"{self.global_batch_size} rows = {self.micro_batch_size} per micro-batch x "
            f"{self.accumulation_steps} accumulated x {ranks}"
        )


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step before memory and speed are estimated; they divide among the ranks."""

    global_batch_size: int
    micro_batch_size: int | None
    """None if the ladder chooses it."""
    origin: str | None
    """Origin of ``train.global_batch_size=auto``; None if the user set it."""


def resolve_batch(train: TrainConfig, ranks: Ranks, begun: TrainConfig | None = None) -> StepRows:
    """Resolve the values that are ``auto``; the micro-batch size may stay open.

    Args:
        begun: The settings that the run was started with, where it is resumed. Its
            ``global_batch_size`` stays, whatever the ranks, because steps of other rows would be
            another training.

    Raises:
        ConfigError: The values contradict each other, or do not divide among the ranks.
    """
    if train.batch_schedule is not None:
        return _resolve_scheduled(train, train.batch_schedule, ranks, begun)
    rows = _set_value(train.global_batch_size)
    micro_batch_size = _set_value(train.per_device_train_batch_size)
    accumulation_steps = _set_value(train.gradient_accumulation_steps)
    origin = None
    if rows is None:
        unchanged = _is_unchanged(train, begun)
        kept = _set_value(begun.global_batch_size) if begun is not None else None
        is_open = micro_batch_size is None or accumulation_steps is None
        if kept is not None and (unchanged or is_open):
            return _keep(kept, micro_batch_size, accumulation_steps, ranks, unchanged)
        rows, origin = _derive(micro_batch_size, accumulation_steps, ranks)
    _check_ranks(rows, ranks)
    micro_batch_size = _resolve_micro_batch_size(rows, micro_batch_size, accumulation_steps, ranks)
    return StepRows(rows, micro_batch_size, origin)


def batch_options(
    train: TrainConfig,
    ranks: Ranks,
    max_seq_length: int,
    accelerator: str,
    begun: TrainConfig | None = None,
) -> list[BatchPlan]:
    """List all ways to reach the global batch size that are open, largest micro-batch first.

    Raises:
        The errors of :func:`resolve_batch`.
    """
    settled = resolve_batch(train, ranks, begun)
    rows, per_group = settled.global_batch_size, settled.global_batch_size // ranks.groups
    sizes = [settled.micro_batch_size] if settled.micro_batch_size is not None else []
    if not sizes:
        most = AUTO_MICRO_BATCH_TOKENS[accelerator] * ranks.sequence_parallel_size
        limit = max(1, most // max_seq_length)
        # The micro-batch must divide the rows of every step.
        common = math.gcd(rows, *(size for _, size in train.batch_schedule or ())) // ranks.groups
        sizes = [size for size in reversed(_divisors(common)) if size <= limit]
    return [
        BatchPlan(
            global_batch_size=rows,
            micro_batch_size=size,
            accumulation_steps=per_group // size,
            world_size=ranks.world_size,
            sequence_parallel_size=ranks.sequence_parallel_size,
        )
        for size in sizes
    ]


def _resolve_scheduled(
    train: TrainConfig, schedule: list[list[int]], ranks: Ranks, begun: TrainConfig | None
) -> StepRows:
    """Resolve the rows of a schedule's first step; the micro-batch divides those of all steps."""
    first, common = schedule[0][1], math.gcd(*(rows for _, rows in schedule))
    fitting_ranks = f"one of {ranks.like(_divisors(common))} ranks"
    _check_sizes(schedule, ranks.groups, ranks.describe(), fitting_ranks)
    micro_batch_size = _set_value(train.per_device_train_batch_size)
    accumulation_steps = _set_value(train.gradient_accumulation_steps)
    fitting = _divisors(common // ranks.groups)
    if _is_unchanged(train, begun) and (micro_batch_size or accumulation_steps):
        # Chosen for the ranks of the first start; on these it may have to be smaller.
        most = micro_batch_size or first // (ranks.groups * (accumulation_steps or 1))
        micro_batch_size = max(size for size in fitting if size <= max(1, most))
    else:
        micro_batch_size = _resolve_micro_batch_size(
            first, micro_batch_size, accumulation_steps, ranks
        )
    if micro_batch_size is not None:
        product = f"{ranks.describe()} x micro-batches of {micro_batch_size}"
        other = f"train.per_device_train_batch_size of one of {fitting}, or auto"
        _check_sizes(schedule, ranks.groups * micro_batch_size, product, other)
    return StepRows(first, micro_batch_size, None)


def _check_sizes(schedule: list[list[int]], unit: int, product: str, other: str) -> None:
    """Check that every size of a schedule is a multiple of ``unit`` rows.

    Args:
        unit: Rows of one forward pass of all ranks.
        product: How they come about, in words.
        other: What else would do, in words.

    Raises:
        ConfigError: With each size that is no multiple, and the nearest ones that are.
    """
    problems = []
    for start, rows in schedule:
        if rows % unit:
            below = rows - rows % unit
            near = " or ".join(str(size) for size in (below, below + unit) if size)
            problems.append(f"[{start},{rows}] needs {near}")
    if problems:
        raise ConfigError(
            f"train.batch_schedule={schedule} does not divide among {product}:"
            f" {'; '.join(problems)}. Or take {other}"
        )


def _is_unchanged(train: TrainConfig, begun: TrainConfig | None) -> bool:
    """Tell whether micro-batch size and accumulation are those that the run was started with."""
    return begun is not None and (
        train.per_device_train_batch_size == begun.per_device_train_batch_size
        and train.gradient_accumulation_steps == begun.gradient_accumulation_steps
    )


def _derive(
    micro_batch_size: int | None, accumulation_steps: int | None, ranks: Ranks
) -> tuple[int, str]:
    """Derive ``train.global_batch_size=auto`` of a new run, and name its origin."""
    unit = ranks.groups * (micro_batch_size or 1) * (accumulation_steps or 1)
    if micro_batch_size and accumulation_steps:
        product = (
            f"train.per_device_train_batch_size={micro_batch_size} x"
            f" train.gradient_accumulation_steps={accumulation_steps} x {ranks.describe()}"
        )
        return unit, f"rows per step: {unit}, {product}"
    rows = math.ceil(AUTO_GLOBAL_BATCH_ROWS / unit) * unit
    factors = [ranks.describe()]
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
    ranks: Ranks,
    unchanged: bool,
) -> StepRows:
    """Keep the rows of a run that is resumed.

    Args:
        unchanged: The command is that of the first start. Its micro-batch size or accumulation was
            for the ranks of that time, and is adapted; values set since must divide the rows.
    """
    if rows % ranks.groups:
        raise ConfigError(
            f"the run began with train.global_batch_size={rows}, which it keeps and which does not"
            f" divide among {ranks.describe()}: resume with one of {ranks.like(_divisors(rows))}"
            " ranks, or begin another run with run_name= or output_dir="
        )
    per_group = rows // ranks.groups
    if unchanged and micro_batch_size is not None:
        micro_batch_size = max(size for size in _divisors(per_group) if size <= micro_batch_size)
    elif unchanged and accumulation_steps is not None:
        micro_batch_size = per_group // max(
            size for size in _divisors(per_group) if size <= accumulation_steps
        )
    else:
        micro_batch_size = _resolve_micro_batch_size(
            rows, micro_batch_size, accumulation_steps, ranks
        )
    return StepRows(rows, micro_batch_size, f"rows per step: {rows}, as the run began")


def _resolve_micro_batch_size(
    rows: int, micro_batch_size: int | None, accumulation_steps: int | None, ranks: Ranks
) -> int | None:
    rows_per_group = rows // ranks.groups
    if micro_batch_size is not None and accumulation_steps is not None:
        product = micro_batch_size * accumulation_steps
        if product != rows_per_group:
            raise ConfigError(
                f"train.per_device_train_batch_size={micro_batch_size} x"
                f" train.gradient_accumulation_steps={accumulation_steps} x"
                f" {ranks.describe()} are {product * ranks.groups} rows, not"
                f" train.global_batch_size={rows}: leave one of the three to auto"
            )
    elif accumulation_steps is not None:
        _check_divides(
            "train.gradient_accumulation_steps", accumulation_steps, rows, rows_per_group, ranks
        )
        return rows_per_group // accumulation_steps
    elif micro_batch_size is not None:
        _check_divides(
            "train.per_device_train_batch_size", micro_batch_size, rows, rows_per_group, ranks
        )
    return micro_batch_size


def _check_ranks(rows: int, ranks: Ranks) -> None:
    if rows % ranks.groups:
        below = rows - rows % ranks.groups
        near = [size for size in (below, below + ranks.groups) if size]
        raise ConfigError(
            f"train.global_batch_size={rows} does not divide among {ranks.describe()}: "
            f"take {' or '.join(map(str, near))}, or auto"
        )


def _check_divides(key: str, value: int, rows: int, rows_per_group: int, ranks: Ranks) -> None:
    if rows_per_group % value:
        unit = "rank" if ranks.sequence_parallel_size == 1 else "group"
        raise ConfigError(
            f"{key}={value} does not divide the {rows_per_group} rows per {unit}"
            f" (train.global_batch_size={rows}, {ranks.describe()}): one of"
            f" {_divisors(rows_per_group)}, or auto; or train.global_batch_size=auto"
        )


def _divisors(value: int) -> list[int]:
    # Only up to the square root, because the value may be a billion.
    small = [size for size in range(1, math.isqrt(value) + 1) if value % size == 0]
    return sorted({*small, *(value // size for size in small)})


def _set_value(value: int | str) -> int | None:
    """Return the value that the user set; None for ``auto``."""
    return value if isinstance(value, int) else None
