"""The optimizer's state by parameter name: the slices that this rank holds, in every ZeRO stage.

Master weights and states are in flat fp32 tensors whose layout depends on stage and world size.
Callers see neither: they get a name, an offset in the flattened parameter, and the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

import torch

from llmtune.engine.nvme_swap import swapped_in
from llmtune.storage.layout import MASTER_WEIGHT

if TYPE_CHECKING:
    from llmtune.engine.train_module import TrainModule

_LOSS_SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


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


def state_keys(module: TrainModule) -> tuple[str, ...]:
    """Name the tensors of a slice: the fp32 copy of the weight, and the optimizer's states."""
    return (MASTER_WEIGHT, *module.optimizer.states)


def state_slices(module: TrainModule) -> list[StateSlice]:
    """List the slices that this rank holds, by sub-group.

    The slices of all ranks cover every trained parameter; without ZeRO those of each rank do.
    """
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    if module.zero_stage == 3:
        return sorted(_stage3_slices(module, names), key=lambda part: part.sub_group)
    if module.zero_stage > 0:
        return list(_stage12_slices(module, names))
    return list(_stage0_slices(module, names))


def iterate_in_memory(
    module: TrainModule, slices: list[StateSlice], write_back: bool = False
) -> Iterator[list[StateSlice]]:
    """Yield the slices in batches whose states are in memory until the next batch is requested.

    States are read and written only inside such a batch. With the optimizer on NVMe a batch is a
    sub-group.
    """
    for sub_group, batch in groupby(slices, key=lambda part: part.sub_group):
        if sub_group < 0:
            yield list(batch)
            continue
        with swapped_in(module.engine.optimizer, sub_group, write_back):
            yield list(batch)


def slices_to_save(module: TrainModule) -> list[StateSlice]:
    """List the slices that this rank saves: an equal share where every rank holds everything."""
    slices = state_slices(module)
    if module.zero_stage > 0 or module.rank.world_size == 1:
        return slices

    # Stage 0 on several ranks: every rank holds all, and saves an equal part.
    owned = []
    for part in slices:
        size = math.ceil(part.numel / module.rank.world_size)
        start = module.rank.rank * size
        count = min(size, part.numel - start)
        if count > 0:
            owned.append(
                StateSlice(
                    name=part.name,
                    start=start,
                    numel=count,
                    parameter_numel=part.parameter_numel,
                    flat=part.flat,
                    flat_offset=part.flat_offset + start,
                )
            )
    return owned


def view_state(module: TrainModule, part: StateSlice, kind: str) -> torch.Tensor:
    """Return a view of a slice's values; zeros before the first step.

    It is valid within the batch of :func:`iterate_in_memory`.
    """
    if kind == MASTER_WEIGHT:
        return part.view(part.flat)
    state = module.torch_optimizer.state.get(part.flat)
    return part.view(state[kind]) if state else torch.zeros(part.numel)


def make_state(module: TrainModule, slices: list[StateSlice], steps: int) -> None:
    """Create zero states, as the optimizer's first step would, and set its step counter."""
    for flat in {id(part.flat): part.flat for part in slices}.values():
        state = module.torch_optimizer.state[flat]
        if module.optimizer.update is None:
            # torch's fused kernels need the counter on the device of the values.
            state["step"] = torch.tensor(float(steps), device=flat.device)
        else:
            state["step"] = steps
        for kind in module.optimizer.states:
            if kind in state:
                # The same tensor is kept, because the NVMe swapper refers to it.
                state[kind].data.zero_()
            else:
                state[kind] = torch.zeros_like(flat.data)


def write_state(module: TrainModule, part: StateSlice, kind: str, values: torch.Tensor) -> None:
    """Write values into this rank's slice; the state must exist."""
    target = part.flat if kind == MASTER_WEIGHT else module.torch_optimizer.state[part.flat][kind]
    with torch.no_grad():
        part.view(target).copy_(values)


def optimizer_steps(module: TrainModule) -> int:
    """Return the steps that the optimizer has counted; skipped steps are not among them."""
    counts = [
        int(state["step"]) for state in module.torch_optimizer.state.values() if "step" in state
    ]
    return max(counts, default=0)


def read_loss_scale(module: TrainModule) -> dict[str, float]:
    """Read the state of fp16's dynamic loss scaler; empty in other precisions."""
    scaler = _loss_scaler(module)
    if scaler is None:
        return {}
    return {key: getattr(scaler, key) for key in _LOSS_SCALE_FIELDS if hasattr(scaler, key)}


def write_loss_scale(module: TrainModule, values: dict[str, float]) -> None:
    """Restore the loss scaler's state from :func:`read_loss_scale`."""
    scaler = _loss_scaler(module)
    if scaler is not None:
        for key, value in values.items():
            setattr(scaler, key, value)


def _loss_scaler(module: TrainModule) -> Any:
    if "fp16" not in module.config:
        return None
    optimizer = module.engine.optimizer
    return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)


def _stage0_slices(module: TrainModule, names: dict[int, str]) -> Iterator[StateSlice]:
    optimizer = module.engine.optimizer
    if hasattr(optimizer, "fp32_groups"):
        pairs = zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups), strict=True)
    else:
        # fp32: the parameters are their own masters.
        own = [
            parameter
            for group in module.torch_optimizer.param_groups
            for parameter in group["params"]
        ]
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


def _stage12_slices(module: TrainModule, names: dict[int, str]) -> Iterator[StateSlice]:
    optimizer = module.engine.optimizer
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


def _stage3_slices(module: TrainModule, names: dict[int, str]) -> Iterator[StateSlice]:
    optimizer = module.engine.optimizer
    for parameter in module.model.parameters():
        if not parameter.requires_grad:
            continue
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        # ds_tensor.numel() would be that of a placeholder while the slice is on NVMe.
        start = module.rank.rank * parameter.ds_tensor.ds_numel
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
