"""Tokens whose embeddings the base model never trained, such as Llama-3's reserved ones: little can be learned on them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: Endings of the names of input and output embeddings in the field's models.
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "lm_head.weight")

#: A row counts as untrained whose norm is below this share of the usual one (Llama-3's are smaller by orders of magnitude).
_SMALL_SHARE = 0.01

#: Rows by which the usual norm is known.
_SAMPLED_ROWS = 257


def find_untrained_tokens(folder: Path, tokens: Iterable[int]) -> list[int]:
    """Those of the tokens that have an embedding of next to no length. Only their rows are read.

    Args:
        folder: Model folder with safetensors.
    """
    from safetensors import safe_open

    wanted = sorted(set(tokens))
    found: set[int] = set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                if name.endswith(_EMBEDDINGS):
                    found |= _small_rows(tensors.get_slice(name), wanted)
    return sorted(found)


def _small_rows(embeddings: Any, tokens: list[int]) -> set[int]:
    rows = int(embeddings.get_shape()[0])
    step = max(1, rows // _SAMPLED_ROWS)
    usual = sorted(_norm(embeddings, row) for row in range(0, rows, step))
    limit = _SMALL_SHARE * usual[len(usual) // 2]
    return {token for token in tokens if token < rows and _norm(embeddings, token) < limit}


def _norm(embeddings: Any, row: int) -> float:
    return float(embeddings[row : row + 1].float().norm())
