"""The optimizer's state by parameter name: the slices that this rank holds, in every ZeRO stage.

A slice has one tensor of master weights and one of each state, stored as the optimizer stores them;
where that is in blocks of 8 bits, also one with the blocks' scales. A state that has not the
parameter's shape cannot be cut: the slice with the parameter's first element has all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from llmtune.engine.nvme_swap import swapped_in
from llmtune.engine.optimizers.converting_optimizer import Blocks, ConvertingOptimizer
from llmtune.engine.state_slices import StateSlice, list_slices
from llmtune.optimizer.block_codes import count_blocks, encode_blocks
from llmtune.optimizer.storage import BLOCK_ELEMENTS, SCALES
from llmtune.storage.layout import MASTER_WEIGHT

if TYPE_CHECKING:
    from llmtune.engine.train_module import TrainModule

_LOSS_SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def state_kinds(module: TrainModule, part: StateSlice | None = None) -> tuple[str, ...]:
    """Name what a slice holds: the master weight, and the optimizer's states.

    Args:
        part: A slice, or None for all that any slice holds.
    """
    if part is None:
        return (MASTER_WEIGHT, *module.optimizer.all_states)
    matrix = module.optimizer.matrix
    if matrix is not None and part.name in module.matrices:
        return (MASTER_WEIGHT, *matrix.states)
    return (MASTER_WEIGHT, *module.optimizer.shapes_of(tuple(part.flat.shape)))


def uncut_numel(module: TrainModule, part: StateSlice, kind: str) -> int | None:
    """Count the elements of a state that has not its parameter's shape; None for all others."""
    if kind == MASTER_WEIGHT or module.optimizer.state_shapes is None:
        return None
    own = tuple(part.flat.shape)
    shape = module.optimizer.state_shapes(own)[kind]
    return None if shape == own else math.prod(shape)


def state_tensors(module: TrainModule, part: StateSlice) -> dict[str, tuple[torch.dtype, int]]:
    """Return the tensors that a slice is stored in: name -> dtype and elements."""
    tensors: dict[str, tuple[torch.dtype, int]] = {}
    for kind in state_kinds(module, part):
        storage = module.optimizer.storage(kind)
        uncut = uncut_numel(module, part, kind)
        if uncut is not None:
            if part.start == 0:
                tensors[kind] = (torch.float32, uncut)
        elif storage.in_blocks:
            tensors[kind] = (torch.uint8, part.numel)
            tensors[kind + SCALES] = (torch.float32, count_blocks(part.start, part.numel))
        else:
            is_half = storage.element_bytes == 2
            tensors[kind] = (torch.bfloat16 if is_half else torch.float32, part.numel)
    return tensors


def state_slices(module: TrainModule) -> list[StateSlice]:
    """List the slices that this rank holds (:func:`llmtune.engine.state_slices.list_slices`)."""
    return list_slices(module.engine.optimizer, module.model, module.zero_stage, module.rank.rank)


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


def view_state(module: TrainModule, part: StateSlice, name: str) -> torch.Tensor:
    """Return a view of one of a slice's tensors; zeros before the first step.

    It is valid within the batch of :func:`iterate_in_memory`.

    Args:
        name: One of :func:`state_tensors`.
    """
    if name == MASTER_WEIGHT:
        return part.view(part.flat)
    state = module.torch_optimizer.state.get(part.flat)
    if not state:
        dtype, numel = state_tensors(module, part)[name]
        return torch.zeros(numel, dtype=dtype)
    stored = state[name.removesuffix(SCALES)]
    if uncut_numel(module, part, name) is not None:
        whole: torch.Tensor = stored.view(-1)
        return whole
    if not isinstance(stored, Blocks):
        return part.view(stored)
    first, last = _blocks_of(module, part)
    if name.endswith(SCALES):
        return stored.scales[first:last]
    lead = part.start % BLOCK_ELEMENTS
    return stored.codes[first:last].view(-1).narrow(0, lead, part.numel)


def make_state(module: TrainModule, slices: list[StateSlice], steps: int) -> None:
    """Create zero states, as the optimizer's first step would, and set its step counter."""
    own = module.torch_optimizer
    for part in {id(part.flat): part for part in slices}.values():
        flat = part.flat
        if isinstance(own, ConvertingOptimizer):
            # What a batch of slices does not cover is padding.
            own.make_state(flat)["step"] = steps
            continue
        state = own.state[flat]
        if module.optimizer.update is None:
            # torch's fused kernels need the counter on the device of the values.
            state["step"] = torch.tensor(float(steps), device=flat.device)
        else:
            state["step"] = steps
        shapes = module.optimizer.shapes_of(tuple(flat.shape))
        for kind in state_kinds(module, part)[1:]:
            if kind in state:
                # The same tensor is kept, because the NVMe swapper refers to it.
                state[kind].data.zero_()
            else:
                state[kind] = flat.data.new_zeros(shapes.get(kind, flat.shape))


def write_state(module: TrainModule, part: StateSlice, kind: str, values: torch.Tensor) -> None:
    """Write values into this rank's slice; the state must exist.

    Args:
        kind: One of :func:`state_kinds`.
        values: fp32, shape (numel,); all of a state that has not the parameter's shape.
    """
    target = part.flat if kind == MASTER_WEIGHT else module.torch_optimizer.state[part.flat][kind]
    with torch.no_grad():
        if uncut_numel(module, part, kind) is not None:
            target.view(-1).copy_(values)
            return
        if not isinstance(target, Blocks):
            part.view(target).copy_(values)
            return
        first, last = _blocks_of(module, part)
        padded = torch.zeros(BLOCK_ELEMENTS * (last - first))
        padded.narrow(0, part.start % BLOCK_ELEMENTS, part.numel).copy_(values)
        codes, scales = encode_blocks(
            padded.view(-1, BLOCK_ELEMENTS), module.optimizer.storage(kind)
        )
        target.codes[first:last].copy_(codes)
        target.scales[first:last].copy_(scales)


def _blocks_of(module: TrainModule, part: StateSlice) -> tuple[int, int]:
    """Return the first block of a slice, and the first one that is no longer its own."""
    piece = module.torch_optimizer.piece_of(part)
    return piece.block, piece.block + piece.blocks


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
