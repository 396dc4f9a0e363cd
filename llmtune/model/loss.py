"""The loss: the sum over trained tokens; the caller divides by their number."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812


class Targets(Protocol):
    """The trained tokens of a batch."""

    @property
    def positions(self) -> torch.Tensor:
        """Positions of their logits in the flattened batch, int64. Shape (trained tokens,)."""

    @property
    def tokens(self) -> torch.Tensor:
        """The tokens to predict there, int64. Shape (trained tokens,)."""


def sum_token_losses(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Return the summed cross entropy in fp32, a scalar.

    Args:
        logits: (rows, length, vocabulary).

    Only the trained rows of ``logits`` are converted to fp32; converting all is most of the usual
    loss's memory. They are selected by index: with a mask the host would wait for the GPU to count
    them.
    """
    picked = logits.flatten(0, 1).index_select(0, targets.positions).float()
    return F.cross_entropy(picked, targets.tokens, reduction="sum")
