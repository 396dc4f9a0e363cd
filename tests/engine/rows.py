"""Rows of random tokens, as a micro-batch has them."""

from __future__ import annotations

import torch

from llmtune.data.load.batch import Batch
from tests.labels import targets_of


def random_rows(rows: int, length: int, vocab: int, seed: int) -> Batch:
    """All tokens trained, none padded."""
    input_ids = torch.randint(
        0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed)
    )
    return Batch(input_ids=input_ids, targets=targets_of(input_ids))
