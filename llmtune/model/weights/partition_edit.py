"""Change a rank's slice of a parameter that ZeRO 3 has partitioned, without gathering it.

The slice of rank ``r`` begins at element ``r * P`` of the flattened tensor, where ``P`` is the size
of a slice (:mod:`llmtune.model.weights.zero3_loading`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Change = Callable[[torch.Tensor, int], None]
"""Changes values of the flattened tensor in place, of which the first has this index."""


def is_partitioned(parameter: Any) -> bool:
    """Tell whether ZeRO 3 has partitioned a parameter."""
    return hasattr(parameter, "ds_tensor")


@contextmanager
def open_slice(parameter: Any, rank: int) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Open this rank's slice of a partitioned parameter for writing.

    Yields:
        The flat slice with its padding, its first element in the flattened parameter, and its
        elements without the padding.
    """
    swapper = parameter.nvme_swapper
    swapped = swapper is not None and swapper.swappable_tensor(parameter)
    if swapped:
        # A slice on NVMe is read into one of the swapper's buffers, changed, and written back.
        swapper.swap_in([parameter], async_op=False)
    partition = parameter.ds_tensor
    size = partition.numel()
    start = rank * size
    yield partition.data.view(-1), start, max(0, min(size, parameter.ds_numel - start))
    if swapped:
        swapper.swap_out_and_release([parameter])
    # hpZ keeps a second slice, for gathers within a node. ``zero.Init`` took it from uninitialized
    # memory; without it, it is made from the weights when they are first gathered and released.
    if getattr(parameter, "ds_secondary_tensor", None) is not None:
        parameter.ds_secondary_tensor = None


def change_own(parameter: Any, change: Change, rank: int) -> None:
    """Change what this rank holds of a parameter: its slice, or all of it.

    Args:
        change: Called with a flat view of the slice without its padding.
    """
    with torch.no_grad():
        if not is_partitioned(parameter):
            change(parameter.data.view(-1), 0)
            return
        with open_slice(parameter, rank) as (target, start, count):
            if count:
                change(target[:count], start)


def write_own(parameter: Any, values: torch.Tensor, rank: int) -> None:
    """Write what this rank holds of a whole tensor into a parameter."""
    flat = values.reshape(-1)

    def write(target: torch.Tensor, start: int) -> None:
        target.copy_(flat[start : start + target.numel()])

    change_own(parameter, write, rank)
