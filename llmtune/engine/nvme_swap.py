"""Optimizer states that live on NVMe: brought into memory one sub-group at a time, and checked for
what makes them wrong.

The names are those of DeepSpeed 0.19's ``runtime/zero/stage3.py``; its swapper gives
``fp32_partitioned_groups_flat`` and the moments a buffer each while a sub-group is in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmtune.errors import ConfigError
from llmtune.plan.memory.zero_buffers import SECTOR_BYTES


def is_swapped(optimizer: Any, sub_group: int) -> bool:
    """Whether this sub-group's states are on disk between steps; small ones stay in memory."""
    return bool(getattr(optimizer, "swap_optimizer", False)) and bool(
        optimizer._swappable_optimizer_subgroup(sub_group)
    )


@contextmanager
def swapped_in(optimizer: Any, sub_group: int, write_back: bool = False) -> Iterator[None]:
    """The sub-group's states in memory for the length of the block; written back if they were
    changed.
    """
    if not is_swapped(optimizer, sub_group):
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(sub_group)
    try:
        yield
    finally:
        if write_back:
            optimizer._optimizer_states_and_gradient_swap_out(sub_group)
        else:
            optimizer._release_swap_buffers(sub_group)


def check_swapped_offsets(optimizer: Any) -> None:
    """Refuse a layout on which DeepSpeed trains on wrong gradients without a word.

    Gradients of 1 MiB and more are read back by O_DIRECT at their offset inside the sub-group's
    buffer, which must be a multiple of a sector; the plan's parameter groups see to that, and this
    looks at what DeepSpeed made of them.

    Raises:
        ConfigError: Naming the first gradient that would be read wrong.
    """
    swapper = optimizer.optimizer_swapper
    for sub_group, parameters in enumerate(optimizer.fp16_groups):
        if not is_swapped(optimizer, sub_group):
            continue
        for parameter in parameters:
            _, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
            if swapper.is_swappable_tensor(numel=int(numel)) and int(offset) * 4 % SECTOR_BYTES:
                raise ConfigError(
                    f"offload.optimizer=nvme: a gradient of shape {tuple(parameter.ds_shape)} would"
                    f" lie at byte {int(offset) * 4} of its buffer, which is no multiple of"
                    f" {SECTOR_BYTES}, and be read back wrong; take offload=optimizer_cpu, or"
                    " another number of ranks"
                )
