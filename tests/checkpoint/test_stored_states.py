"""The one reader of optimizer state files: any slices, from any number of files, or an error that
names the file.
"""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llmtune.checkpoint.optimizer_files import check_storages
from llmtune.checkpoint.stored_states import (
    StoredParameter,
    StoredSlice,
    map_slices,
    read_stored_states,
)
from llmtune.config.groups.optim import OptimConfig
from llmtune.errors import CheckpointError
from llmtune.optimizer.block_codes import count_blocks, decode_blocks, encode_blocks
from llmtune.optimizer.optimizer import OPTIMIZERS, find_optimizer
from llmtune.optimizer.storage import UNSIGNED_8BIT
from llmtune.storage import layout

VALUES = torch.arange(10.0)


def write(file: Path, where: Any, **tensors: torch.Tensor) -> Path:
    text = where if isinstance(where, str) else json.dumps(where)
    stored = {name.replace("__", "/"): values for name, values in tensors.items()}
    save_file(stored, file, metadata={layout.STATE_SLICES: text})
    return file


def write_slice(file: Path, start: int, end: int, total: int = 10) -> Path:
    part = VALUES[start:end].clone()
    where = {"w": [start, end - start, total]}
    return write(file, where, w__master=part, w__exp_avg=part + 0.5)


@pytest.mark.parametrize("cuts", [[10], [3, 10], [1, 2, 9, 10]])
@pytest.mark.parametrize(("start", "numel"), [(0, 10), (2, 5), (9, 1), (4, 0)])
def test_any_elements_come_from_whatever_files_hold_them(
    tmp_path: Path, cuts: list[int], start: int, numel: int
) -> None:
    starts = [0, *cuts[:-1]]
    files = [
        write_slice(tmp_path / f"{number}.safetensors", first, last)
        for number, (first, last) in enumerate(zip(starts, cuts, strict=True))
    ]
    stored = read_stored_states(reversed(files))
    assert stored["w"].numel == 10
    assert [piece.start for piece in stored["w"].slices] == starts
    expected = VALUES[start : start + numel]
    assert torch.equal(stored["w"].read("master", start, numel), expected)
    assert torch.equal(stored["w"].read("exp_avg", start, numel), expected + 0.5)
    mapped = map_slices(stored, layout.MASTER_WEIGHT)["w"]
    assert torch.equal(torch.cat([piece.values for piece in mapped]), VALUES)
    assert [piece.start for piece in mapped] == starts


def test_elements_that_no_file_holds_are_an_error(tmp_path: Path) -> None:
    stored = read_stored_states([write_slice(tmp_path / "a.safetensors", 0, 4)])
    with pytest.raises(CheckpointError, match="w/master is covered for 2 of 4 elements"):
        stored["w"].read("master", 2, 4)


@pytest.mark.parametrize(
    "where",
    [
        "{",
        "[]",
        "null",
        {"w": 1},
        {"w": [0, 4]},
        {"w": [0, 4, "10"]},
        {"w": [-1, 4, 10]},
        {"w": [8, 4, 10]},
        {"w": [None, 4, 10]},
        {"v": [0, 4, 10]},
    ],
)
def test_a_header_that_says_something_else_is_an_error(tmp_path: Path, where: Any) -> None:
    file = write(tmp_path / "optimizer.safetensors", where, w__master=torch.ones(4))
    with pytest.raises(CheckpointError, match="optimizer.safetensors is"):
        read_stored_states([file])


def test_a_file_without_the_header_of_slices_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "optimizer.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"w/master": torch.ones(4)}, file, metadata=metadata)
        with pytest.raises(CheckpointError, match="is not a state file of llmtune"):
            read_stored_states([file])


def test_sizes_that_contradict_each_other_are_an_error(tmp_path: Path) -> None:
    short = write(tmp_path / "a.safetensors", {"w": [0, 4, 10]}, w__master=torch.ones(3))
    with pytest.raises(CheckpointError, match="w has another size than its header says"):
        read_stored_states([short])
    first = write_slice(tmp_path / "b.safetensors", 0, 4)
    second = write_slice(tmp_path / "c.safetensors", 4, 10, total=12)
    with pytest.raises(CheckpointError, match="w has 12 elements there and 10 in another"):
        read_stored_states([first, second])


def test_a_moment_that_is_missing_or_short_is_an_error(tmp_path: Path) -> None:
    where = {"w": [0, 4, 4]}
    file = write(
        tmp_path / "a.safetensors", where, w__master=torch.ones(4), w__exp_avg=torch.ones(3)
    )
    stored = read_stored_states([file])
    with pytest.raises(CheckpointError, match="a.safetensors: w/exp_avg has another size"):
        stored["w"].read("exp_avg", 0, 4)
    with pytest.raises(CheckpointError, match="a.safetensors: w/exp_avg_sq: .*exp_avg_sq"):
        stored["w"].read("exp_avg_sq", 0, 4)


def test_a_damaged_file_and_one_that_is_gone_are_named(tmp_path: Path) -> None:
    file = write_slice(tmp_path / "a.safetensors", 0, 10)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="a.safetensors is cut off or damaged"):
        read_stored_states([file])
    with pytest.raises(CheckpointError, match="b.safetensors cannot be read"):
        read_stored_states([tmp_path / "b.safetensors"])


def test_no_files_hold_nothing() -> None:
    assert read_stored_states([]) == {}
    assert map_slices({}, layout.MASTER_WEIGHT) == {}


@pytest.mark.parametrize("cut", [256, 300, 1])
def test_blocks_of_8_bits_are_decoded_from_whatever_files_hold_them(
    tmp_path: Path, cut: int
) -> None:
    values = torch.randn(700).square()
    expected, files = torch.empty(700), []
    for number, (start, end) in enumerate(((0, cut), (cut, 700))):
        blocks = count_blocks(start, end - start)
        padded = torch.zeros(blocks * 256)
        padded[start % 256 :][: end - start] = values[start:end]
        codes, scales = encode_blocks(padded.view(-1, 256), UNSIGNED_8BIT)
        decoded = decode_blocks(codes, scales, UNSIGNED_8BIT).view(-1)
        expected[start:end] = decoded[start % 256 :][: end - start]
        file = tmp_path / f"{number}.safetensors"
        stored = {
            "w/master": values[start:end].bfloat16(),
            "w/exp_avg_sq": codes.view(-1)[start % 256 :][: end - start].clone(),
            "w/exp_avg_sq.scales": scales,
        }
        header = {
            layout.STATE_SLICES: json.dumps({"w": [start, end - start, 700]}),
            layout.STATE_STORAGES: json.dumps({"master": "bf16", "exp_avg_sq": UNSIGNED_8BIT.name}),
        }
        save_file(stored, file, metadata=header)
        files.append(file)
    parameter = read_stored_states(files)["w"]
    for start, numel in ((0, 700), (255, 2), (299, 3), (511, 189), (600, 1)):
        found = parameter.read("exp_avg_sq", start, numel)
        assert torch.equal(found, expected[start : start + numel])
    assert torch.equal(parameter.read("master", 0, 700), values.bfloat16().float())


def test_numbers_of_an_unknown_format_are_an_error(tmp_path: Path) -> None:
    file = tmp_path / "optimizer.safetensors"
    header = {
        layout.STATE_SLICES: json.dumps({"w": [0, 4, 4]}),
        layout.STATE_STORAGES: json.dumps({"master": "fp8"}),
    }
    save_file({"w/master": torch.ones(4)}, file, metadata=header)
    with pytest.raises(CheckpointError, match="numbers stored as fp8"):
        read_stored_states([file])


def test_the_state_of_another_optimizer_is_refused_in_words(tmp_path: Path) -> None:
    stored = read_stored_states([write_slice(tmp_path / "a.safetensors", 0, 10)])
    module: Any = SimpleNamespace(optimizer=find_optimizer(OptimConfig(kind="adamw_8bit")))
    with pytest.raises(CheckpointError) as refused:
        check_storages(module, stored, tmp_path)
    assert str(refused.value).startswith(
        f"{tmp_path}: its optimizer state is exp_avg in fp32, master in fp32; AdamW in 8 bits has"
        " master in bf16, exp_avg in signed 8-bit blocks, exp_avg_sq in unsigned 8-bit blocks. An"
        " optimizer resumes its own state only"
    )


#: Optimizers by name whose numbers are their own: a paged one stores those of its unpaged twin.
UNPAGED = [
    kind for kind in OPTIMIZERS.list() if not find_optimizer(OptimConfig(kind=kind)).is_paged
]


@pytest.mark.parametrize(("wrote", "reads"), permutations(UNPAGED, 2))
def test_no_optimizer_reads_the_state_of_another_kind(
    wrote: str, reads: str, tmp_path: Path
) -> None:
    optimizers = [find_optimizer(OptimConfig(kind=kind)) for kind in (wrote, reads)]
    storages, others = (
        {kind: optimizer.storage(kind).name for kind in ("master", *optimizer.all_states)}
        for optimizer in optimizers
    )
    piece = StoredSlice(file=tmp_path, name="w", start=0, numel=1, storages=storages)
    module: Any = SimpleNamespace(optimizer=optimizers[1])
    assert storages != others
    with pytest.raises(CheckpointError, match="An optimizer resumes its own state only"):
        check_storages(module, {"w": StoredParameter(1, (piece,))}, tmp_path)
