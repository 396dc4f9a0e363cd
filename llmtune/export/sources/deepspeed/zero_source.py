"""DeepSpeed's own checkpoints of ZeRO 1, 2 and 3 as a tensor source, without DeepSpeed.

In stages 1 and 2 the ranks' flat tensors of a group, one after the other, are the parameters of the
group. In stage 3 every parameter is divided into equal parts, one per rank, and the parts of a rank
follow each other over all of its flat tensors. Frozen parameters and buffers are in the model
states. This is the layout that ``_zero2_merge_trainable_params`` and
``_zero3_merge_trainable_params`` in ``deepspeed/utils/zero_to_fp32.py`` read (DeepSpeed 0.19.8).
"""

import math
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from llmtune.checkpoint.slices import PiecedTensor, TensorSlice, find_gap
from llmtune.errors import ExportError
from llmtune.export.sources.deepspeed.pickle_reader import StoredTensor
from llmtune.export.sources.deepspeed.rank_files import (
    RankStates,
    model_states_file,
    read_model_states,
    read_rank_states,
)
from llmtune.export.sources.deepspeed.step_folder import COPY_AGAIN, find_step_folder
from llmtune.storage.tensors.dtypes import to_safetensors
from llmtune.storage.tensors.tensor_spec import TensorSpec
from llmtune.units import some


class ZeroSource:
    """The fp32 master weights of what was trained, and everything else as it is stored."""

    def __init__(self, folder: Path) -> None:
        """Map every file and locate every tensor; no numbers are read.

        Raises:
            ExportError: The checkpoint is of another kind, incomplete or damaged; the files and
                tensors are named.
        """
        self.folder = find_step_folder(folder)
        try:
            states = read_rank_states(self.folder)
            self.world_size = len(states.flats)
            self._find_tensors(states)
        except (
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RuntimeError,
            MemoryError,
        ) as error:
            # Names, shapes and offsets come from the files, which may hold anything.
            raise ExportError(
                f"{self.folder} is not as DeepSpeed writes it ({type(error).__name__}: {error});"
                f" {COPY_AGAIN}"
            ) from error

    def _find_tensors(self, states: RankStates) -> None:
        tensors = dict(trained_parameters(states))
        self.trained = frozenset(tensors)
        """Parameters with master weights."""
        for name, tensor in (*frozen_parameters(states), *other_tensors(states)):
            tensors.setdefault(name, tensor)

        shared = states.model.get("shared_params") or {}
        self.shared = {name: owner for name, owner in dict(shared).items() if owner in tensors}
        """Second name of a tensor -> the name under which it is stored."""
        tensors |= {name: tensors[owner] for name, owner in self.shared.items()}

        # In the order of the model's state_dict, and then tensors that it does not name.
        self._tensors = {
            name: tensors[name]
            for name in dict.fromkeys((*states.module, *tensors))
            if name in tensors
        }
        self.specs = {
            name: TensorSpec(name, tensor.spec.dtype, tensor.spec.shape)
            for name, tensor in self._tensors.items()
        }
        unsupported = [
            f"{name} ({spec.dtype})"
            for name, spec in self.specs.items()
            if to_safetensors(spec.dtype) is None
        ]
        if unsupported:
            raise ExportError(f"{self.folder}: dtypes that cannot be exported: {some(unsupported)}")

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield rows of one tensor, put together from the files of the ranks."""
        return self._tensors[name].blocks()


#: Parameter -> shape, in the order in which the flat tensors hold them.
Shapes = dict[str, tuple[int, ...]]


def trained_parameters(states: RankStates) -> Iterator[tuple[str, PiecedTensor]]:
    """Yield the parameters with master weights.

    Raises:
        ExportError: The parts of the ranks do not make up the parameters.
    """
    groups = [_shapes_of(group) for group in states.model["param_shapes"]]
    if states.stage < 3:
        return _trained_in_stage_1_or_2(states, groups)
    shapes: Shapes = {}
    for group in groups:
        shapes |= group
    return _trained_in_stage_3(states, shapes)


def _shapes_of(group: Mapping[str, Any]) -> Shapes:
    return {name: tuple(shape) for name, shape in group.items()}


def _trained_in_stage_1_or_2(
    states: RankStates, groups: list[Shapes]
) -> Iterator[tuple[str, PiecedTensor]]:
    if len(groups) != len(states.flats[0]):
        raise ExportError(
            f"{states.folder}: {len(groups)} groups of parameters, {len(states.flats[0])} of master"
            " weights"
        )
    for index, shapes in enumerate(groups):
        parts = [rank[index].open().reshape(-1) for rank in states.flats]
        paddings = [0] * len(shapes) if states.paddings is None else list(states.paddings[index])
        if len(paddings) != len(shapes):
            raise ExportError(
                f"{states.folder}: group {index} has {len(shapes)} parameters and {len(paddings)}"
                " paddings"
            )

        # One parameter behind the other, over the borders of ranks
        # (``_zero2_merge_trainable_params``).
        offset = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            numel = math.prod(shape)
            yield name, _assemble(states.folder, name, shape, _cut(parts, offset, offset + numel))
            offset += numel + int(padding)
        # Flat groups are padded to a multiple of twice the number of ranks, and some versions
        # store the padding (``zero2_align`` in ``_zero2_merge_trainable_params``).
        alignment = 2 * len(parts)
        available = sum(part.numel() for part in parts)
        if math.ceil(offset / alignment) != math.ceil(available / alignment):
            raise ExportError(
                f"{states.folder}: the parameters of group {index} have {offset} elements, its"
                f" master weights {available}; the files do not belong together; {COPY_AGAIN}"
            )


def _trained_in_stage_3(states: RankStates, shapes: Shapes) -> Iterator[tuple[str, PiecedTensor]]:
    world_size = len(states.flats)
    parts = [_open_groups(rank) for rank in states.flats]

    # Every rank has an equal part of every parameter; the last rank's part is padded.
    shares = {name: math.ceil(math.prod(shape) / world_size) for name, shape in shapes.items()}
    needed = sum(shares.values())
    for rank, groups in enumerate(parts):
        available = sum(group.numel() for group in groups)
        if available != needed:
            hint = ""
            if available < needed:
                hint = " (is the optimizer on NVMe? its numbers are not in these files)"
            raise ExportError(
                f"{states.folder}: rank {rank} has {available} elements of master weights, its"
                f" parts of the parameters have {needed}{hint}; {COPY_AGAIN}"
            )

    offset = 0
    for name, shape in shapes.items():
        last = offset + shares[name]

        # The same range of every rank (``_zero3_merge_trainable_params``).
        values: list[torch.Tensor] = []
        for groups in parts:
            values += _cut(groups, offset, last)
        yield name, _assemble(states.folder, name, shape, values)
        offset = last


def _open_groups(rank: list[StoredTensor]) -> list[torch.Tensor]:
    return [group.open().reshape(-1) for group in rank]


def frozen_parameters(states: RankStates) -> Iterator[tuple[str, PiecedTensor]]:
    """Yield the frozen parameters that are stored apart from the model's ``state_dict``.

    Raises:
        ExportError: The files of some ranks do not have them.
    """
    shapes = states.model.get("frozen_param_shapes") or {}
    if not shapes:
        return

    # Stages 1 and 2 store them whole, stage 3 a fragment per rank (``_zero3_merge_frozen_params``).
    fragments = [states.model.get("frozen_param_fragments") or {}]
    if states.stage == 3:
        for rank in range(1, len(states.flats)):
            file = model_states_file(states.folder, rank)
            if not file.is_file():
                raise ExportError(
                    f"{states.folder}: {file.name} with frozen parameters is missing; {COPY_AGAIN}"
                )
            fragments.append(read_model_states(file).get("frozen_param_fragments") or {})
    for name, shape in shapes.items():
        parts = [fragment.get(name) for fragment in fragments]
        lacking = [
            str(rank) for rank, part in enumerate(parts) if not isinstance(part, StoredTensor)
        ]
        if lacking:
            raise ExportError(
                f"{states.folder}: the frozen {name} is not in the model states of rank"
                f" {some(lacking)}"
            )
        values = [part.open().reshape(-1) for part in parts if isinstance(part, StoredTensor)]
        yield name, _assemble(states.folder, name, tuple(shape), values)


def other_tensors(states: RankStates) -> Iterator[tuple[str, PiecedTensor]]:
    """Yield buffers, and the frozen parameters of stage 1, which are stored nowhere else.

    Second names of tied tensors are left to their owners: where frozen parameters are excluded,
    ``DeepSpeedEngine._get_shared_params`` loses those names. Placeholders of stage 3 have no
    elements and are left out.
    """
    shared = states.model.get("shared_params") or {}
    for name, tensor in states.module.items():
        if not isinstance(tensor, StoredTensor) or name in shared:
            continue
        if tensor.numel or states.stage < 3:
            spec = TensorSpec(name, tensor.dtype, tensor.shape)
            yield name, PiecedTensor(spec, (TensorSlice(0, tensor.open().reshape(-1)),))


def _cut(parts: list[torch.Tensor], first: int, last: int) -> list[torch.Tensor]:
    """Return views of elements ``[first, last)`` of flat tensors that follow each other."""
    views = []
    start = 0
    for part in parts:
        end = start + part.numel()
        if start < last and end > first:
            views.append(part[max(first - start, 0) : last - start])
        start = end
    return views


def _assemble(
    folder: Path, name: str, shape: tuple[int, ...], values: list[torch.Tensor]
) -> PiecedTensor:
    """Make a parameter of its parts in order; the padding of the last part is left out."""
    numel = math.prod(shape)
    starts = accumulate((part.numel() for part in values), initial=0)
    slices = [
        TensorSlice(start, part[: numel - start])
        for start, part in zip(starts, values, strict=False)
        if start < numel and part.numel()
    ]
    gap = find_gap(slices, numel)
    if gap:
        raise ExportError(f"{folder}: {name} is not complete: {gap}; {COPY_AGAIN}")
    dtypes = {part.dtype for part in values} or {torch.float32}
    if len(dtypes) > 1:
        raise ExportError(
            f"{folder}: the ranks hold {name} in different dtypes"
            f" ({some(sorted(map(str, dtypes)))})"
        )
    spec = TensorSpec(name, dtypes.pop(), tuple(int(size) for size in shape))
    return PiecedTensor(spec, tuple(slices))
