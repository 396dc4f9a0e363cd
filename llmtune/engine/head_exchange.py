"""Exchange tokens for heads around attention, among the ranks of a sequence group (Ulysses).

Each rank has a part of the tokens, and computes all that treats tokens one by one. Attention needs
all of them: before it, every rank sends the heads of the others for its own tokens, and gets its
own heads for all tokens; behind it they are sent back (https://arxiv.org/abs/2309.14509). The
gradient takes the same way in the other direction.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from llmtune.engine.distributed import Rank
from llmtune.varlen_attention import exchanging


class HeadExchange:
    """The exchange of a rank with its sequence group; consecutive ranks are a group."""

    def __init__(self, rank: Rank, count: int):
        """Form the groups. Collective over all ranks.

        Args:
            count: Ranks of a group.
        """
        self.count = count
        self.group: Any = None
        for first in range(0, rank.world_size, count):
            group = dist.new_group(list(range(first, first + count)), timeout=rank.timeout)
            if first <= rank.rank < first + count:
                self.group = group

    def to_heads(self, *parts: torch.Tensor) -> list[torch.Tensor]:
        """Return queries, keys and values of this rank's heads for all tokens.

        Args:
            parts: Those of all heads for this rank's tokens, each of shape (1, heads, tokens of a
                part, width). Heads that cannot be divided, which several queries share, are
                repeated.

        Returns:
            Each of shape (1, heads of a rank, tokens, width).
        """
        count = self.count
        # All go in one collective: of each, the heads of one rank are one block.
        whole = [_repeat(part, count) for part in parts]
        sent = [part.reshape(count, -1) for part in whole]
        received = _exchange_rows(torch.cat(sent, dim=1), self.group)
        blocks = received.split([part.shape[1] for part in sent], dim=1)
        of_all_tokens: list[torch.Tensor] = []
        for block, part in zip(blocks, whole, strict=True):
            _, heads, tokens, width = part.shape
            # From the ranks' parts, one behind the other, to the tokens in their order.
            by_rank = block.reshape(count, heads // count, tokens, width)
            joined = by_rank.transpose(0, 1).reshape(1, heads // count, count * tokens, width)
            of_all_tokens.append(joined)
        return of_all_tokens

    def to_tokens(self, attended: torch.Tensor) -> torch.Tensor:
        """Return what all heads made of this rank's tokens.

        Args:
            attended: What this rank's heads made of all tokens. Shape (1, tokens, heads of a rank,
                width).

        Returns:
            Shape (1, tokens of a part, heads, width).
        """
        _, tokens, heads, width = attended.shape
        part = tokens // self.count
        received = _exchange_rows(attended.reshape(self.count, -1), self.group)
        by_rank = received.reshape(self.count, part, heads, width)
        return by_rank.transpose(0, 1).reshape(1, part, self.count * heads, width)


def exchanging_heads(rank: Rank, count: int) -> AbstractContextManager[None]:
    """Make a context in which the ranks of each sequence group share the tokens of their rows.

    Collective over all ranks.

    Args:
        count: Ranks of a group; 1 exchanges nothing.
    """
    return exchanging(HeadExchange(rank, count) if count > 1 else None)


def _repeat(part: torch.Tensor, count: int) -> torch.Tensor:
    """Repeat each head so often that they divide among ``count`` ranks, for the same queries."""
    return part.repeat_interleave(count // math.gcd(part.shape[1], count), dim=1)


def _exchange_rows(rows: torch.Tensor, group: Any) -> torch.Tensor:
    apply: Any = _AllToAll.apply
    received: torch.Tensor = apply(rows, group)
    return received


class _AllToAll(torch.autograd.Function):
    """Send row ``i`` to rank ``i`` of the group, and get one from each."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: Any) -> torch.Tensor:
        """Exchange rows of shape (ranks, numbers)."""
        ctx.group = group
        return _exchange(rows, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Send each gradient back to where the row came from."""
        return _exchange(gradient, ctx.group), None


def _exchange(rows: torch.Tensor, group: Any) -> torch.Tensor:
    received = torch.empty_like(rows, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, rows.contiguous(), group=group)
    return received
