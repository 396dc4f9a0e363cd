"""Rows of random tokens, as a micro-batch has them."""

from __future__ import annotations

import torch


class RandomRows:
    """All tokens trained, none padded."""

    def __init__(self, rows: int, length: int, vocab: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.input_ids = torch.randint(0, vocab, (rows, length), generator=generator)
        self.attention_mask = torch.ones_like(self.input_ids)
        self.labels = self.input_ids
