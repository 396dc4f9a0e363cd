"""The loss, in one place: the sum over trained tokens. Whoever divides knows the number of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

#: Label of a position that is not trained; torch's own default, and the data's.
IGNORE = -100


def sum_token_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Summed cross entropy in fp32, and the number of tokens in it.

    Args:
        logits: (rows, length, vocabulary).
        labels: (rows, length), not shifted; ``IGNORE`` is not trained.

    Only the rows of ``logits`` that are trained are made fp32, which is most of the memory of the usual loss.
    """
    targets = labels[:, 1:]
    trained = targets != IGNORE
    picked = logits[:, :-1][trained].float()
    return F.cross_entropy(picked, targets[trained], reduction="sum"), int(trained.sum())
