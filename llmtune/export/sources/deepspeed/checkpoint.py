"""DeepSpeed's own checkpoints of ZeRO 1, 2 and 3, one tensor at a time, without DeepSpeed.

Every rank's ``*_optim_states.pt`` holds its part of the fp32 master weights as flat tensors without
names; the model states of rank 0 say which parameters, of which shapes, lie in them in which order.
In stages 1 and 2 the ranks' flat tensors of a group are one after the other the group's parameters.
In stage 3 every parameter is cut into equal parts, one a rank, and a rank's parts lie one after the
other over all its flat tensors. Frozen parameters and buffers are in the model states.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from llmtune.checkpoint.slices import PiecedTensor, TensorSlice, find_gap
from llmtune.errors import ExportError
from llmtune.export.sources.base import some
from llmtune.export.sources.deepspeed.pickle_reader import StoredTensor, read_archive
from llmtune.storage.safetensors_writer import DTYPE_NAMES, TensorSpec

_LATEST = "latest"
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_ANY_OPTIMIZER_FILE, _ANY_FILE = "*_optim_states.pt", "*_states.pt"

#: Files of other ways to divide a model than over data-parallel ranks -> what wrote them.
_OTHERS = (
    (
        re.compile(r"(expp_rank_|layer_\d+_expert_|expert_).*"),
        "a mixture of experts (expert parallelism)",
    ),
    (re.compile(r"layer_\d+-model_.*"), "pipeline parallelism"),
    (re.compile(r".*mp_rank_(?!00)\d+_.*"), "tensor parallelism"),
)
_EXPERT_KEYS = ("ds_autoep_layers", "autoep_layers", "ds_zero_partition_groups")

_FLAT_12, _FLAT_3 = "single_partition_of_fp32_groups", "fp32_flat_groups"
#: Ranks that are missing, of which so many are looked for at the most.
_NAMED_RANKS = 1000
_AGAIN = "copy the whole folder again, or take an older checkpoint"


def is_zero_checkpoint(folder: Path) -> bool:
    """Whether a folder holds files of DeepSpeed's ranks, itself or one level below; whether they
    can be read is not asked.
    """
    return folder.is_dir() and bool(_holders(folder))


def find_step_folder(folder: Path) -> Path:
    """The folder with the files of the ranks.

    Raises:
        ExportError: There is none, or it is not said which.
    """
    holders = _holders(folder) if folder.is_dir() else []
    if folder in holders:
        return folder
    latest = folder / _LATEST
    if latest.is_file():
        name = latest.read_text(errors="replace").strip()
        found = folder / name
        if not name or not found.resolve().is_relative_to(folder.resolve()):
            raise ExportError(f"{latest} names {name!r}, which is not a folder inside {folder}")
        if not any(found.glob(_ANY_FILE)):
            raise ExportError(
                f"{latest} names {name}, which holds no checkpoint of DeepSpeed; {_AGAIN}"
            )
        return found
    if len(holders) == 1:
        return holders[0]
    if holders:
        names = [holder.name for holder in holders]
        raise ExportError(
            f"{folder} has no file {_LATEST} and several checkpoints: {some(names)}; name one of"
            " them"
        )
    raise ExportError(f"{folder} holds no checkpoint of DeepSpeed (*_optim_states.pt)")


class ZeroSource:
    """A checkpoint of DeepSpeed: fp32 master weights of what was trained, everything else as it is
    stored.
    """

    def __init__(self, folder: Path) -> None:
        """Map every file and find every tensor; of the numbers nothing is read.

        Raises:
            ExportError: The checkpoint is of another kind, incomplete or damaged; the files and
                tensors are named.
        """
        self.folder = find_step_folder(folder)
        try:
            states = _read_states(self.folder)
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
            # The files say where everything is; they may say anything.
            raise ExportError(
                f"{self.folder} is not as DeepSpeed writes it ({type(error).__name__}: {error});"
                f" {_AGAIN}"
            ) from error

    def _find_tensors(self, states: _States) -> None:
        found = {name: PiecedTensor(*item) for name, item in _trained(states)}
        self.trained = frozenset(found)
        """Parameters with master weights."""
        for name, tensor in (*_frozen(states), *_others(states)):
            found.setdefault(name, tensor)
        shared = states.model.get("shared_params") or {}
        self.shared = {name: owner for name, owner in dict(shared).items() if owner in found}
        """Second names of tensors -> the name under which they are stored."""
        found |= {name: found[owner] for name, owner in self.shared.items()}
        # As the model has them, and then what it does not name.
        self._tensors = {
            name: found[name] for name in dict.fromkeys((*states.module, *found)) if name in found
        }
        self.specs = {
            name: TensorSpec(name, tensor.spec.dtype, tensor.spec.shape)
            for name, tensor in self._tensors.items()
        }
        strange = [
            f"{name} ({spec.dtype})"
            for name, spec in self.specs.items()
            if spec.dtype not in DTYPE_NAMES
        ]
        if strange:
            raise ExportError(f"{self.folder}: dtypes that cannot be exported: {some(strange)}")

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Rows of one tensor, put together from the files of the ranks."""
        return self._tensors[name].blocks()


@dataclass(frozen=True, slots=True, kw_only=True)
class _States:
    """What the files of all ranks say."""

    folder: Path
    stage: int
    model: Mapping[str, Any]
    """Of rank 0."""
    module: Mapping[str, Any]
    """The model's ``state_dict``; under stage 3 placeholders for its parameters."""
    flats: list[list[StoredTensor]]
    """Rank -> group -> its part of the master weights."""
    paddings: Any
    """Stages 1 and 2: group -> elements behind each parameter that are none of it."""


def _holders(folder: Path) -> list[Path]:
    """The folder itself, or those in it, with files of ranks."""
    if any(folder.glob(_ANY_FILE)):
        return [folder]
    return sorted({file.parent for file in folder.glob(f"*/{_ANY_FILE}")})


def _read_states(folder: Path) -> _States:
    files = _optimizer_files(folder)
    states = []
    for file in files:
        content = read_archive(file)
        state = content.get("optimizer_state_dict") if isinstance(content, Mapping) else None
        if not isinstance(state, Mapping) or not (_FLAT_12 in state or _FLAT_3 in state):
            raise ExportError(f"{file} holds no master weights of ZeRO 1, 2 or 3")
        states.append(state)
    key = _FLAT_12 if _FLAT_12 in states[0] else _FLAT_3
    _check_same_run(folder, files, states, key)
    stage = 3 if key == _FLAT_3 else 2
    file = folder / (
        "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    )
    if not file.is_file():
        raise ExportError(f"{folder}: {file.name} is missing; {_AGAIN}")
    model = _read_model(file)
    flats = [list(state[key]) for state in states]
    for path, groups in zip(files, flats, strict=True):
        if not all(isinstance(group, StoredTensor) for group in groups):
            raise ExportError(f"{path}: {key} holds other things than tensors; {_AGAIN}")
    module = model.get("module")
    return _States(
        folder=folder,
        stage=stage,
        model=model,
        module=module if isinstance(module, Mapping) else {},
        flats=flats,
        paddings=states[0].get("param_alignment_paddings"),
    )


def _read_model(file: Path) -> Mapping[str, Any]:
    model = read_archive(file)
    if not isinstance(model, Mapping) or "module" not in model:
        raise ExportError(f"{file} holds no model states of DeepSpeed")
    experts = [key for key in _EXPERT_KEYS if model.get(key)]
    if experts:
        raise ExportError(
            f"{file} is of a mixture of experts ({experts[0]}); convert it with DeepSpeed's"
            " ds_to_universal"
        )
    shapes = model.get("param_shapes")
    if not isinstance(shapes, list) or not all(isinstance(group, Mapping) for group in shapes):
        raise ExportError(
            f"{file} names no parameters of ZeRO (param_shapes): it is of stage 0 or of another"
            " program"
        )
    return model


def _optimizer_files(folder: Path) -> list[Path]:
    """One file a rank, by rank."""
    for pattern, kind in _OTHERS:
        other = next(
            (file.name for file in sorted(folder.iterdir()) if pattern.fullmatch(file.name)), None
        )
        if other:
            raise ExportError(
                f"{folder} was written with {kind} ({other}), which cannot be read; "
                "convert it with DeepSpeed's ds_to_universal"
            )
    ranks: dict[int, Path] = {}
    for file in sorted(folder.glob(_ANY_OPTIMIZER_FILE)):
        match = _OPTIMIZER_FILE.fullmatch(file.name)
        if match is None:
            raise ExportError(f"{folder}: {file.name} is no file of a ZeRO rank")
        if int(match[1]) in ranks:
            raise ExportError(
                f"{folder} holds rank {match[1]} twice: {ranks[int(match[1])].name} and {file.name}"
            )
        ranks[int(match[1])] = file
    if not ranks:
        raise ExportError(
            f"{folder} holds no *_optim_states.pt: a checkpoint of ZeRO stage 0, or only a part of"
            " one; for stage 0 convert mp_rank_00_model_states.pt"
        )
    # A name may hold any number.
    missing = [
        str(rank) for rank in range(min(max(ranks), len(ranks) + _NAMED_RANKS)) if rank not in ranks
    ]
    if missing:
        raise ExportError(
            f"{folder}: *_optim_states.pt of rank {some(missing)} is missing; {_AGAIN}"
        )
    return [ranks[rank] for rank in sorted(ranks)]


def _check_same_run(
    folder: Path, files: list[Path], states: list[Mapping[str, Any]], key: str
) -> None:
    """Every file is from as many ranks as there are files, of one stage, with as many groups."""
    ranks = [_count_ranks(state) for state in states]
    if len(set(ranks)) > 1:
        other = next(number for number, count in enumerate(ranks) if count != ranks[0])
        raise ExportError(
            f"{folder}: {files[0].name} was written by {ranks[0]} ranks and {files[other].name} by"
            f" {ranks[other]}: one of two runs left files of the other; {_AGAIN}"
        )
    if ranks[0] != len(files):
        missing = [
            str(rank) for rank in range(len(files), min(ranks[0], len(files) + _NAMED_RANKS))
        ]
        what = (
            f"*_optim_states.pt of rank {some(missing)} is missing"
            if missing
            else "there are more files than that"
        )
        raise ExportError(f"{folder} was written by {ranks[0]} ranks, and {what}; {_AGAIN}")
    for file, state in zip(files, states, strict=True):
        if key not in state or len(state[key]) != len(states[0][key]):
            raise ExportError(
                f"{folder}: {file.name} is of another stage or model than {files[0].name}; {_AGAIN}"
            )
        if state.get("ds_zero_partition_groups"):
            raise ExportError(
                f"{folder}: {file.name} is of a mixture of experts; use DeepSpeed's ds_to_universal"
            )


def _count_ranks(state: Mapping[str, Any]) -> int:
    counts = state.get("partition_count")
    return int(max(counts) if isinstance(counts, list | tuple) else counts or 0)


def _trained(states: _States) -> Iterator[tuple[str, tuple[TensorSpec, tuple[TensorSlice, ...]]]]:
    """Parameters in the flat tensors."""
    shapes: list[dict[str, tuple[int, ...]]] = [
        {name: tuple(shape) for name, shape in group.items()}
        for group in states.model["param_shapes"]
    ]
    if states.stage == 3:
        return _trained_3(
            states, {name: shape for group in shapes for name, shape in group.items()}
        )
    return _trained_12(states, shapes)


def _trained_12(
    states: _States, shapes: list[dict[str, tuple[int, ...]]]
) -> Iterator[tuple[str, tuple[TensorSpec, tuple[TensorSlice, ...]]]]:
    """The ranks' parts of a group, one behind the other, are its parameters, one behind the
    other.
    """
    if len(shapes) != len(states.flats[0]):
        raise ExportError(
            f"{states.folder}: {len(shapes)} groups of parameters, {len(states.flats[0])} of master"
            " weights"
        )
    for number, group in enumerate(shapes):
        parts = [rank[number].open().reshape(-1) for rank in states.flats]
        paddings = [0] * len(group) if states.paddings is None else list(states.paddings[number])
        if len(paddings) != len(group):
            raise ExportError(
                f"{states.folder}: group {number} has {len(group)} parameters and {len(paddings)}"
                " paddings"
            )
        offset = 0
        for (name, shape), padding in zip(group.items(), paddings, strict=True):
            numel = math.prod(shape)
            yield name, _assemble(states.folder, name, shape, _cut(parts, offset, offset + numel))
            offset += numel + int(padding)
        # Ranks are filled up to a multiple of twice their number, and some versions store what
        # fills them.
        step = 2 * len(parts)
        available = sum(part.numel() for part in parts)
        if math.ceil(offset / step) != math.ceil(available / step):
            raise ExportError(
                f"{states.folder}: the parameters of group {number} have {offset} elements, its"
                f" master weights {available}; the files do not belong together; {_AGAIN}"
            )


def _trained_3(
    states: _States, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[TensorSpec, tuple[TensorSlice, ...]]]]:
    """Every rank has an equal part of every parameter; the last one's is filled up."""
    world = len(states.flats)
    parts = [[group.open().reshape(-1) for group in rank] for rank in states.flats]
    needed = sum(math.ceil(math.prod(shape) / world) for shape in shapes.values())
    for number, rank in enumerate(parts):
        available = sum(group.numel() for group in rank)
        if available != needed:
            hint = (
                " (is the optimizer on NVMe? its numbers are not in these files)"
                if available < needed
                else ""
            )
            raise ExportError(
                f"{states.folder}: rank {number} has {available} elements of master weights, its"
                f" parts of the parameters have {needed}{hint}; {_AGAIN}"
            )
    offset = 0
    for name, shape in shapes.items():
        share = math.ceil(math.prod(shape) / world)
        cut = [_cut(rank, offset, offset + share) for rank in parts]
        yield (
            name,
            _assemble(states.folder, name, shape, [values for rank in cut for values in rank]),
        )
        offset += share


def _frozen(states: _States) -> Iterator[tuple[str, PiecedTensor]]:
    """Parameters that were not trained, where the checkpoint has them apart from the model's
    ``state_dict``.
    """
    shapes = states.model.get("frozen_param_shapes") or {}
    if not shapes:
        return
    fragments = [states.model.get("frozen_param_fragments") or {}]
    if states.stage == 3:
        for rank in range(1, len(states.flats)):
            file = states.folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
            if not file.is_file():
                raise ExportError(
                    f"{states.folder}: {file.name} with frozen parameters is missing; {_AGAIN}"
                )
            fragments.append(_read_model(file).get("frozen_param_fragments") or {})
    for name, shape in shapes.items():
        parts = [rank.get(name) for rank in fragments]
        lacking = [
            str(rank) for rank, part in enumerate(parts) if not isinstance(part, StoredTensor)
        ]
        if lacking:
            raise ExportError(
                f"{states.folder}: the frozen {name} is not in the model states of rank"
                f" {some(lacking)}"
            )
        values = [part.open().reshape(-1) for part in parts if isinstance(part, StoredTensor)]
        yield name, PiecedTensor(*_assemble(states.folder, name, tuple(shape), values))


def _others(states: _States) -> Iterator[tuple[str, PiecedTensor]]:
    """Buffers, and what stage 1 keeps nowhere else: its frozen parameters.

    Second names of tied tensors are left to their owners: where frozen ones are excluded, DeepSpeed
    forgets those names. Placeholders of stage 3 have no elements.
    """
    shared = states.model.get("shared_params") or {}
    for name, tensor in states.module.items():
        if (
            isinstance(tensor, StoredTensor)
            and name not in shared
            and (tensor.numel or states.stage < 3)
        ):
            spec = TensorSpec(name, tensor.dtype, tensor.shape)
            yield name, PiecedTensor(spec, (TensorSlice(0, tensor.open().reshape(-1)),))


def _cut(parts: list[torch.Tensor], first: int, last: int) -> list[torch.Tensor]:
    """Elements ``[first, last)`` of flat tensors that lie one behind the other."""
    ends = list(accumulate(part.numel() for part in parts))
    cuts = []
    for part, end in zip(parts, ends, strict=True):
        start = end - part.numel()
        if start < last and end > first:
            cuts.append(part[max(first - start, 0) : last - start])
    return cuts


def _assemble(
    folder: Path, name: str, shape: tuple[int, ...], values: list[torch.Tensor]
) -> tuple[TensorSpec, tuple[TensorSlice, ...]]:
    """A parameter of its parts in order; what fills up the last of them is left out."""
    numel = math.prod(shape)
    starts = accumulate((part.numel() for part in values), initial=0)
    pieces = [
        TensorSlice(start, part[: numel - start])
        for start, part in zip(starts, values, strict=False)
        if start < numel and part.numel()
    ]
    gap = find_gap(pieces, numel)
    if gap:
        raise ExportError(f"{folder}: {name} is not complete: {gap}; {_AGAIN}")
    dtypes = {part.dtype for part in values} or {torch.float32}
    if len(dtypes) > 1:
        raise ExportError(
            f"{folder}: the ranks hold {name} in different dtypes"
            f" ({some(sorted(map(str, dtypes)))})"
        )
    return TensorSpec(name, dtypes.pop(), tuple(int(size) for size in shape)), tuple(pieces)
