"""Tokens that the base model never trained are found by their embeddings."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from llmtune.model.untrained import find_untrained_tokens


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
