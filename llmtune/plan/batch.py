"""One global batch size becomes micro-batches and accumulation."""

from __future__ import annotations

from dataclasses import dataclass

from llmtune.config.schema import TrainConfig
from llmtune.errors import ConfigError

#: ``auto`` fills a micro-batch up to this many tokens; more rarely makes a GPU faster and always costs activations. A CPU
#: gains nothing from large micro-batches and loses what they pad (SmolLM2-135M on 2 cores: 354 tokens/s at 2 rows, 316 at 8).
AUTO_MICRO_BATCH_TOKENS = {"cuda": 32768, "cpu": 1024}


@dataclass(frozen=True, slots=True)
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
            f"{self.accumulation_steps} accumulated x {self.world_size} rank(s)"
        )


def batch_options(config: TrainConfig, world_size: int, max_seq_length: int, accelerator: str) -> list[BatchPlan]:
    """Every way to reach the global batch that the config leaves open, largest micro-batch first.

    Raises:
        ConfigError: The numbers do not multiply up to ``train.global_batch_size``.
    """
    rows = config.global_batch_size
    if rows % world_size:
        raise ConfigError(
            f"train.global_batch_size={rows} does not divide among {world_size} ranks: "
            f"take {rows - rows % world_size or world_size} or {rows - rows % world_size + world_size}"
        )
    rows_per_rank = rows // world_size
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if isinstance(micro, int) and isinstance(accumulation, int):
        if micro * accumulation != rows_per_rank:
            raise ConfigError(
                f"train.per_device_train_batch_size={micro} x train.gradient_accumulation_steps={accumulation} x "
                f"{world_size} rank(s) is not train.global_batch_size={rows}: leave one of them to auto"
            )
        sizes = [micro]
    elif isinstance(accumulation, int):
        _check_divides("train.gradient_accumulation_steps", accumulation, rows, rows_per_rank, world_size)
        sizes = [rows_per_rank // accumulation]
    elif isinstance(micro, int):
        _check_divides("train.per_device_train_batch_size", micro, rows, rows_per_rank, world_size)
        sizes = [micro]
    else:
        limit = max(1, AUTO_MICRO_BATCH_TOKENS[accelerator] // max_seq_length)
        sizes = [size for size in range(rows_per_rank, 0, -1) if rows_per_rank % size == 0 and size <= limit]
    return [BatchPlan(rows, size, rows_per_rank // size, world_size) for size in sizes]


def _check_divides(key: str, value: int, rows: int, rows_per_rank: int, world_size: int) -> None:
    if rows_per_rank % value:
        divisors = [size for size in range(1, rows_per_rank + 1) if rows_per_rank % size == 0]
        raise ConfigError(
            f"{key}={value} does not divide the {rows_per_rank} rows of a rank "
            f"(train.global_batch_size={rows}, {world_size} ranks): one of {divisors}, or auto"
        )
