"""The place of every trained parameter's elements in this rank's flat tensors, in every stage.

Master weights and states are in flat tensors whose layout depends on stage and world size. Callers
see neither: they get a name, an offset in the flattened parameter, and where the values are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSlice:
    """Elements ``[start, start + numel)`` of a flattened parameter, and their tensor."""

    name: str
    start: int
    numel: int
    parameter_numel: int
    flat: torch.Tensor
    """The fp32 tensor that the optimizer updates; the key of its state."""
    flat_offset: int
    sub_group: int = -1
    """Its sub-group in stage 3, whose states may be on NVMe; -1 in other stages."""

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the slice of ``tensor``, which has the layout of ``flat``."""
        return tensor.data.view(-1).narrow(0, self.flat_offset, self.numel)


def list_slices(optimizer: Any, model: Any, zero_stage: int, rank: int) -> list[StateSlice]:
    """List the slices that a rank holds, by sub-group.

    The slices of all ranks cover every trained parameter; without ZeRO those of each rank do.

    Args:
        optimizer: DeepSpeed's, around torch's.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if zero_stage == 3:
        found = _stage3_slices(optimizer, model, names, rank)
        return sorted(found, key=lambda part: part.sub_group)
    if zero_stage > 0:
        return list(_stage12_slices(optimizer, names))
    return list(_stage0_slices(optimizer, names))


def _stage0_slices(optimizer: Any, names: dict[int, str]) -> Iterator[StateSlice]:
    if hasattr(optimizer, "fp32_groups"):
        pairs = zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True)
    else:
        # fp32: the parameters are their own masters.
        groups = getattr(optimizer, "optimizer", optimizer).param_groups
        own = [parameter for group in groups for parameter in group["params"]]
        pairs = zip(chain(own), chain(own), strict=True)
    for parameter, master in pairs:
        yield StateSlice(
            name=names[id(parameter)],
            start=0,
            numel=parameter.numel(),
            parameter_numel=parameter.numel(),
            flat=master,
            flat_offset=0,
        )


def _stage12_slices(optimizer: Any, names: dict[int, str]) -> Iterator[StateSlice]:
    for parameters, flat in zip(
        optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True
    ):
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:
                in_parameter = mapping.lp_fragment_address
                in_flat = mapping.hp_fragment_address
                name = names[id(parameter)]
                yield StateSlice(
                    name=name,
                    start=in_parameter.start,
                    numel=in_parameter.numel,
                    parameter_numel=parameter.numel(),
                    flat=flat,
                    flat_offset=in_flat.start,
                )


def _stage3_slices(
    optimizer: Any, model: Any, names: dict[int, str], rank: int
) -> Iterator[StateSlice]:
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        # ds_tensor.numel() would be that of a placeholder while the slice is on NVMe.
        start = rank * parameter.ds_tensor.ds_numel
        # The last rank's slice is padded.
        count = min(int(size), parameter.ds_numel - start)
        if count > 0:
            flat = optimizer.fp32_partitioned_groups_flat[group]
            yield StateSlice(
                name=names[id(parameter)],
                start=start,
                numel=count,
                parameter_numel=parameter.ds_numel,
                flat=flat,
                flat_offset=int(offset),
                sub_group=int(group),
            )
