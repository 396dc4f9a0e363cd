"""Read the files of all ranks of a DeepSpeed checkpoint, and check that they belong together.

Every rank's ``*_optim_states.pt`` holds its part of the fp32 master weights as flat tensors without
names; the model states of rank 0 hold the names and shapes of the parameters in their order. The
keys are those of ``parse_model_states`` and ``parse_optim_states`` in
``deepspeed/utils/zero_to_fp32.py`` (DeepSpeed 0.19.8).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.errors import ExportError
from llmtune.export.sources.deepspeed.pickle_reader import StoredTensor, read_archive
from llmtune.export.sources.deepspeed.step_folder import COPY_AGAIN
from llmtune.units import some

_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_ANY_OPTIMIZER_FILE = "*_optim_states.pt"

#: Files of models that were divided otherwise than over data-parallel ranks -> what wrote them.
_UNSUPPORTED = (
    (
        re.compile(r"(expp_rank_|layer_\d+_expert_|expert_).*"),
        "a mixture of experts (expert parallelism)",
    ),
    (re.compile(r"layer_\d+-model_.*"), "pipeline parallelism"),
    (re.compile(r".*mp_rank_(?!00)\d+_.*"), "tensor parallelism"),
)
_EXPERT_KEYS = ("ds_autoep_layers", "autoep_layers", "ds_zero_partition_groups")

#: Key of the flat master weights, of stages 1 and 2 and of stage 3.
_FLAT_12, _FLAT_3 = "single_partition_of_fp32_groups", "fp32_flat_groups"

#: Missing ranks that are looked for at most: a file's name may hold any number.
_MOST_MISSING_RANKS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStates:
    """The contents of the files of all ranks."""

    folder: Path
    stage: int
    """3, or 2 for stages 1 and 2, whose files have the same layout."""
    model: Mapping[str, Any]
    """The model states of rank 0."""
    module: Mapping[str, Any]
    """The model's ``state_dict``; in stage 3 it holds placeholders for the parameters."""
    flats: list[list[StoredTensor]]
    """Rank -> group -> its part of the master weights."""
    paddings: Any
    """Stages 1 and 2: group -> number of padding elements behind each parameter, or None."""


def read_rank_states(folder: Path) -> RankStates:
    """Read the files of a step's folder; tensors are mapped.

    Raises:
        ExportError: A file is missing, damaged, or of another run, stage or kind of parallelism.
    """
    # Optimizer states of every rank.
    files = _find_optimizer_files(folder)
    states = []
    for file in files:
        content = read_archive(file)
        state = content.get("optimizer_state_dict") if isinstance(content, Mapping) else None
        if not isinstance(state, Mapping) or not (_FLAT_12 in state or _FLAT_3 in state):
            raise ExportError(f"{file} holds no master weights of ZeRO 1, 2 or 3")
        states.append(state)
    key = _FLAT_12 if _FLAT_12 in states[0] else _FLAT_3
    _check_same_run(folder, files, states, key)
    flats = [list(state[key]) for state in states]

    # Model states of rank 0.
    stage = 3 if key == _FLAT_3 else 2
    model_file = folder / "mp_rank_00_model_states.pt"
    if stage == 3:
        model_file = model_states_file(folder, 0)
    if not model_file.is_file():
        raise ExportError(f"{folder}: {model_file.name} is missing; {COPY_AGAIN}")
    model = read_model_states(model_file)

    for file, groups in zip(files, flats, strict=True):
        if not all(isinstance(group, StoredTensor) for group in groups):
            raise ExportError(f"{file}: {key} holds other things than tensors; {COPY_AGAIN}")
    module = model.get("module")
    return RankStates(
        folder=folder,
        stage=stage,
        model=model,
        module=module if isinstance(module, Mapping) else {},
        flats=flats,
        paddings=states[0].get("param_alignment_paddings"),
    )


def model_states_file(folder: Path, rank: int) -> Path:
    """Return the path of the model states of one rank of stage 3."""
    return folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def read_model_states(file: Path) -> Mapping[str, Any]:
    """Read the model states of one rank.

    Raises:
        ExportError: The file holds something else, experts, or no names of parameters.
    """
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


def _find_optimizer_files(folder: Path) -> list[Path]:
    """Return one file per rank, in the order of the ranks."""
    # Other kinds of parallelism are known by the names of their files.
    names = sorted(file.name for file in folder.iterdir())
    for pattern, kind in _UNSUPPORTED:
        other = next((name for name in names if pattern.fullmatch(name)), None)
        if other:
            raise ExportError(
                f"{folder} was written with {kind} ({other}), which cannot be read; "
                "convert it with DeepSpeed's ds_to_universal"
            )

    # One file per rank; ``get_optim_files`` of ``deepspeed/utils/zero_to_fp32.py`` has this
    # pattern.
    ranks: dict[int, Path] = {}
    for file in sorted(folder.glob(_ANY_OPTIMIZER_FILE)):
        match = _OPTIMIZER_FILE.fullmatch(file.name)
        if match is None:
            raise ExportError(f"{folder}: {file.name} is no file of a ZeRO rank")
        rank = int(match[1])
        if rank in ranks:
            raise ExportError(
                f"{folder} holds rank {match[1]} twice: {ranks[rank].name} and {file.name}"
            )
        ranks[rank] = file
    if not ranks:
        raise ExportError(
            f"{folder} holds no *_optim_states.pt: a checkpoint of ZeRO stage 0, or only a part of"
            " one; for stage 0 convert mp_rank_00_model_states.pt"
        )

    # A rank in the middle may be missing.
    last = min(max(ranks), len(ranks) + _MOST_MISSING_RANKS)
    missing = [str(rank) for rank in range(last) if rank not in ranks]
    if missing:
        raise ExportError(
            f"{folder}: *_optim_states.pt of rank {some(missing)} is missing; {COPY_AGAIN}"
        )
    return [ranks[rank] for rank in sorted(ranks)]


def _check_same_run(
    folder: Path, files: list[Path], states: list[Mapping[str, Any]], key: str
) -> None:
    """Check that all files are from as many ranks as there are files, of one stage and model."""
    # All files tell the same number of ranks, and there are as many files.
    counts = [_count_ranks(state) for state in states]
    for file, count in zip(files, counts, strict=True):
        if count != counts[0]:
            raise ExportError(
                f"{folder}: {files[0].name} was written by {counts[0]} ranks and {file.name} by"
                f" {count}: one of two runs left files of the other; {COPY_AGAIN}"
            )
    if counts[0] != len(files):
        last = min(counts[0], len(files) + _MOST_MISSING_RANKS)
        missing = [str(rank) for rank in range(len(files), last)]
        problem = "there are more files than that"
        if missing:
            problem = f"*_optim_states.pt of rank {some(missing)} is missing"
        raise ExportError(f"{folder} was written by {counts[0]} ranks, and {problem}; {COPY_AGAIN}")

    # They are of one ZeRO stage, with the same groups, and without experts.
    for file, state in zip(files, states, strict=True):
        if key not in state or len(state[key]) != len(states[0][key]):
            raise ExportError(
                f"{folder}: {file.name} is of another stage or model than {files[0].name};"
                f" {COPY_AGAIN}"
            )
        if state.get("ds_zero_partition_groups"):
            raise ExportError(
                f"{folder}: {file.name} is of a mixture of experts; use DeepSpeed's ds_to_universal"
            )


def _count_ranks(state: Mapping[str, Any]) -> int:
    """Return ``partition_count``, which is a list with one number per group in some versions."""
    counts = state.get("partition_count")
    if isinstance(counts, list | tuple):
        return int(max(counts))
    return int(counts or 0)
