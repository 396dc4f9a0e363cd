"""Tokens that the base model never trained are found by their embeddings."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.errors import MissingPrerequisiteError
from llmtune.model.untrained_tokens import find_untrained_tokens


def test_embeddings_of_no_length_are_found(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    # 0 pads, and its embedding is nothing by design.
    assert find_untrained_tokens(folder, range(512)) == [0]
    file = folder / "model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
    tensors[name][[7, 300]] = 0
    tensors[name][8] *= 1e-4
    save_file(tensors, file, metadata={"format": "pt"})
    assert find_untrained_tokens(folder, [5, 7, 8, 9]) == [7, 8]
    assert find_untrained_tokens(folder, range(1, 512)) == [7, 8, 300]
    assert find_untrained_tokens(folder, [10_000]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_read_as_torch_reads_them(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    table = torch.randn(600, 24).mul_(torch.rand(600, 1) * 0.03).to(dtype)
    save_file(
        {"first": torch.ones(3), "lm_head.weight": table, "x": torch.ones(2)},
        tmp_path / "model.safetensors",
    )
    norms = table.float().norm(dim=1)
    usual = norms[:: 600 // 257].sort().values
    small = (norms < 0.01 * usual[len(usual) // 2]).nonzero().flatten().tolist()
    assert 0 < len(small) < 60
    assert find_untrained_tokens(tmp_path, range(600)) == small


def test_embeddings_in_fewer_bits_are_left_alone(tmp_path: Path) -> None:
    save_file(
        {"lm_head.weight": torch.zeros(8, 4, dtype=torch.uint8)}, tmp_path / "model.safetensors"
    )
    assert find_untrained_tokens(tmp_path, range(8)) == []


@pytest.mark.parametrize(
    "text",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        b"",
        b"\x02" + bytes(7) + b"{}x"[:1],
        b"\x02" + bytes(7) + b"[]",
    ],
)
def test_what_is_no_safetensors_file_is_named(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(text)
    with pytest.raises(
        MissingPrerequisiteError, match=r"model.safetensors: no whole safetensors file"
    ):
        find_untrained_tokens(tmp_path, [1])


def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    save_file({"lm_head.weight": torch.ones(8, 4)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(MissingPrerequisiteError, match="cut off"):
        find_untrained_tokens(tmp_path, [1])
