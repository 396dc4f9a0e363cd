"""Rows on disk for tests that need no tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash

from llmtune.data.store.store_writer import write_store
from llmtune.data.store.token_store import Rows, TokenStore
from llmtune.data.tokenize.token_row import TokenBlock


def make_rows(folder: Path, ids: list[list[int]], masks: list[list[bool]] | None = None) -> Rows:
    """Rows with these ids, all but the first token trained unless told otherwise."""
    masks = masks or [[False] + [True] * (len(row) - 1) for row in ids]
    arrays = [np.array(row, dtype=np.int32) for row in ids]
    block = TokenBlock(
        file="rows.jsonl",
        position=0,
        ids=np.concatenate(arrays),
        mask=np.concatenate([np.array(mask, dtype=bool) for mask in masks]),
        lengths=np.array([len(row) for row in ids], dtype=np.int32),
        trained=np.array([sum(mask[1:]) for mask in masks], dtype=np.int32),
        hashes=np.array(
            [xxhash.xxh3_64_intdigest(row.tobytes()) for row in arrays], dtype=np.uint64
        ),
        begins=np.ones(len(ids), dtype=bool),
        lines=np.arange(1, len(ids) + 1),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_store([block], folder)
    return Rows([TokenStore(folder)], np.arange(len(ids), dtype=np.int64))
