"""The loss, in one place: the sum over trained tokens.

Whoever divides knows the number of tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812


class Targets(Protocol):
    """What is trained in a batch."""

    @property
    def positions(self) -> torch.Tensor:
        """Of the logits that are judged, in the flattened batch, int64. Shape (trained tokens,)."""

    @property
    def tokens(self) -> torch.Tensor:
        """The tokens that follow there, int64. Shape (trained tokens,)."""


def sum_token_losses(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Summed cross entropy in fp32, a scalar.

    Args:
        logits: (rows, length, vocabulary).

    Only the rows of ``logits`` that are trained are made fp32, which is most of the memory of the
    usual loss. They are picked by number: a mask would have the host wait for the GPU, which alone
    knows how many there are.
    """
    picked = logits.flatten(0, 1).index_select(0, targets.positions).float()
    return F.cross_entropy(picked, targets.tokens, reduction="sum")
