"""Group parameters for the optimizer, and cut the groups as ZeRO 3 does: slices and sub-groups."""

from __future__ import annotations

from dataclasses import replace

from llmtune.optimizer.param_groups import GroupOf
from llmtune.plan.memory.placement import Placement
from llmtune.plan.memory.shapes import ModelShape, TensorShape

#: A gradient is read back into the middle of a buffer by O_DIRECT, which needs this alignment; else
#: DeepSpeed silently trains on wrong gradients.
SECTOR_BYTES = 512


def partition_numel(numel: int, world_size: int) -> int:
    """Return the elements of a rank's slice, padding included."""
    return -(-numel // world_size)


def assign_groups(shape: ModelShape, group_of: GroupOf) -> ModelShape:
    """Return the shape with the key of its settings in each trained tensor."""
    tensors = tuple(
        replace(tensor, group=group_of(tensor.name).key) if tensor.trained else tensor
        for tensor in shape.tensors
    )
    return replace(shape, tensors=tensors)


def parameter_groups(
    tensors: list[TensorShape], placement: Placement, world_size: int
) -> list[list[TensorShape]]:
    """Return the optimizer's parameter groups: matrices, then vectors, which have no weight decay.

    Matrices of equal settings are a group, and so are vectors; those with the optimizer's own
    settings come first.

    With the optimizer on NVMe the groups also keep gradients right. A matrix whose slice is not a
    whole number of sectors has its own group, where its offset is 0, and vectors, which shift
    offsets, are apart.
    """
    matrices: dict[str, list[TensorShape]] = {"": []}
    vectors: dict[str, list[TensorShape]] = {"": []}
    alone: list[list[TensorShape]] = []
    for tensor in tensors:
        if not tensor.trained:
            continue
        is_aligned = is_sector_aligned(partition_numel(tensor.numel, world_size))
        if placement.optimizer == "nvme" and not tensor.vector and not is_aligned:
            alone.append([tensor])
        else:
            (vectors if tensor.vector else matrices).setdefault(tensor.group, []).append(tensor)
    return [group for group in (*matrices.values(), *alone, *vectors.values()) if group]


def is_sector_aligned(numel: int) -> bool:
    """Tell whether ``numel`` fp32 elements fill whole sectors."""
    return numel * 4 % SECTOR_BYTES == 0


def sub_groups(
    groups: list[list[TensorShape]], world_size: int, sub_group_size: int
) -> list[list[TensorShape]]:
    """Split the groups into the sub-groups that stage 3 steps one after the other.

    Follows ``runtime/zero/stage3.py: _create_fp16_sub_groups``.
    """
    result: list[list[TensorShape]] = []
    for group in groups:
        if sub_group_size >= rank_numel(group, world_size):
            result.append(group)
            continue
        current: list[TensorShape] = []
        held = 0
        for tensor in group:
            current.append(tensor)
            held += partition_numel(tensor.numel, world_size)
            if held >= sub_group_size:
                result.append(current)
                current, held = [], 0
        if current:
            result.append(current)
    return result


def rank_numel(tensors: list[TensorShape], world_size: int) -> int:
    """Count the elements that one rank holds of these tensors."""
    return sum(partition_numel(tensor.numel, world_size) for tensor in tensors)
