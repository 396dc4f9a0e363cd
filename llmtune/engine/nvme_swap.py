"""Bring optimizer states on NVMe into memory one sub-group at a time, and check their layout.

The names are those of DeepSpeed 0.19.8's ``runtime/zero/stage3.py``; its swapper gives
``fp32_partitioned_groups_flat`` and the moments a buffer each while a sub-group is in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmtune.errors import ConfigError
from llmtune.plan.memory.parameter_groups import SECTOR_BYTES


def is_swapped(optimizer: Any, sub_group: int) -> bool:
    """Tell whether a sub-group's states are on disk between steps; small ones stay in memory."""
    return bool(getattr(optimizer, "swap_optimizer", False)) and bool(
        optimizer._swappable_optimizer_subgroup(sub_group)
    )


@contextmanager
def swapped_in(optimizer: Any, sub_group: int, write_back: bool = False) -> Iterator[None]:
    """Hold a sub-group's states in memory for the duration of the block.

    Args:
        write_back: Write them to disk at the end, because they were changed.
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
    """Refuse a layout with which DeepSpeed would silently train on wrong gradients.

    Gradients of 1 MiB and more are read back by O_DIRECT at their offset inside the sub-group's
    buffer, which must be a multiple of a sector. The plan's parameter groups ensure that; this
    checks what DeepSpeed made of them.

    Raises:
        ConfigError: With the first gradient that would be read wrong.
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
                    f" begin at byte {int(offset) * 4} of its buffer, which is not a multiple of"
                    f" {SECTOR_BYTES}, and would be read back wrong; take offload=optimizer_cpu, or"
                    " another number of ranks"
                )
