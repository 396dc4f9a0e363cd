"""Change a rank's slice of a parameter that ZeRO 3 has partitioned, without gathering it.

The slice of rank ``r`` begins at element ``r * P`` of the flattened tensor, where ``P`` is the size
of a slice (:mod:`llmtune.model.weights.zero3_loading`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Change = Callable[[torch.Tensor, int], None]
"""Changes values of the flattened tensor in place, of which the first has this index."""


def change_own(parameter: Any, change: Change, rank: int) -> None:
    """Change what this rank holds of a parameter: its slice, or all of it.

    Args:
        change: Called with a flat view of the slice without its padding.
    """
    with torch.no_grad():
        if not hasattr(parameter, "ds_tensor"):
            change(parameter.data.view(-1), 0)
            return
        _change_slice(parameter, change, rank)


def _change_slice(parameter: Any, change: Change, rank: int) -> None:
    swapper = parameter.nvme_swapper
    swapped = swapper is not None and swapper.swappable_tensor(parameter)
    if swapped:
        swapper.swap_in([parameter], async_op=False)
    partition = parameter.ds_tensor
    size = partition.numel()
    start = rank * size
    count = max(0, min(size, parameter.ds_numel - start))
    if count:
        change(partition.data.view(-1)[:count], start)
    if swapped:
        swapper.swap_out_and_release([parameter])
    # hpZ's second slice is made anew from the first one when the parameter is gathered next.
    if getattr(parameter, "ds_secondary_tensor", None) is not None:
        parameter.ds_secondary_tensor = None


def write_own(parameter: Any, values: torch.Tensor, rank: int) -> None:
    """Write what this rank holds of a whole tensor into a parameter."""
    flat = values.reshape(-1)

    def write(target: torch.Tensor, start: int) -> None:
        target.copy_(flat[start : start + target.numel()])

    change_own(parameter, write, rank)
