"""Find tokens whose embeddings the base model never trained, such as Llama-3's reserved ones.

Adapters learn little on them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.errors import MissingPrerequisiteError
from llmtune.storage.tensors.safetensors_header import read_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Endings of the names of input and output embeddings in the field's models.
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "lm_head.weight",
)

#: A row counts as untrained whose norm is below this share of the usual one (Llama-3's are smaller
#: by orders of magnitude).
_SMALL_SHARE = 0.01

#: Rows from which the usual norm is taken.
_SAMPLED_ROWS = 257

#: safetensors' names of types. numpy has no bf16, which is the upper half of an fp32 number.
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


def find_untrained_tokens(folder: Path, tokens: Iterable[int]) -> list[int]:
    """Find the tokens whose embedding has a norm close to 0.

    Only their rows are read, and torch is not needed.

    Args:
        folder: Model folder with safetensors. Embeddings in fewer than 16 bits are not checked.
    """
    candidates = sorted(set(tokens))
    untrained: set[int] = set()
    for file in sorted(folder.glob("*.safetensors")):
        for embedding in _open_embeddings(file):
            untrained |= _small_rows(embedding, candidates)
    return sorted(untrained)


def _open_embeddings(file: Path) -> list[NDArray[np.generic]]:
    """Map the embeddings of a file into memory; shape (tokens, hidden), bf16 as ``uint16``.

    Raises:
        MissingPrerequisiteError: It is not a safetensors file.
    """
    try:
        header = read_header(file)
    except ValueError as error:
        raise MissingPrerequisiteError(
            f"{file}: no whole safetensors file (cut off, or a pointer of Git LFS: run git lfs pull"
            f" in its folder; {error})"
        ) from error
    embeddings: list[NDArray[np.generic]] = []
    for name, about in header.items():
        if name.endswith(_EMBEDDINGS) and about.kind in _DTYPES and len(about.shape) == 2:
            embeddings.append(np.memmap(file, _DTYPES[about.kind], "r", about.start, about.shape))
    return embeddings


def _small_rows(embedding: NDArray[np.generic], tokens: list[int]) -> set[int]:
    rows = len(embedding)
    sampled = np.sort(_norms(embedding, list(range(0, rows, max(1, rows // _SAMPLED_ROWS)))))
    limit = _SMALL_SHARE * float(sampled[len(sampled) // 2])
    known = [token for token in tokens if token < rows]
    return {
        token for token, norm in zip(known, _norms(embedding, known), strict=True) if norm < limit
    }


def _norms(embedding: NDArray[np.generic], rows: list[int]) -> NDArray[np.float32]:
    picked = np.asarray(embedding[rows])
    if picked.dtype == np.uint16:
        vectors = (picked.astype(np.uint32) << 16).view(np.float32)
    else:
        vectors = picked.astype(np.float32)
    return np.asarray(np.linalg.norm(vectors, axis=1), dtype=np.float32)
