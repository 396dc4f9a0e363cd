"""Summed losses in fp32; the caller divides by the weight of the targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812

from llmtune.task.targets import Targets


def pick(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Select the judged logits, in fp32. Shape (targets, outputs).

    Only they are converted to fp32; converting all is most of the usual loss's memory. They are
    selected by index: with a mask the host would wait for the GPU to count them.
    """
    return logits.reshape(-1, logits.shape[-1]).index_select(0, targets.positions).float()


def sum_cross_entropy(
    logits: torch.Tensor,
    targets: Targets,
    weights: Sequence[float] = (),
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Sum the cross entropy of classes, or of the tokens of a vocabulary.

    Args:
        weights: Weight of each class; empty where all weigh the same.
        smoothing: Share of a target that is spread over all classes, itself included: torch's
            ``label_smoothing``, and the formula of transformers' ``LabelSmoother``.
    """
    picked = pick(logits, targets)
    of_classes = picked.new_tensor(weights) if weights else None
    return F.cross_entropy(
        picked, targets.values, weight=of_classes, reduction="sum", label_smoothing=smoothing
    )


def sum_binary_cross_entropy(
    logits: torch.Tensor, targets: Targets, weights: Sequence[float] = ()
) -> torch.Tensor:
    """Sum the cross entropy of every class by itself, of rows that have several.

    Args:
        weights: Weight of the rows that have a class, for each class.
    """
    picked = pick(logits, targets)
    of_classes = picked.new_tensor(weights) if weights else None
    return F.binary_cross_entropy_with_logits(
        picked, targets.values, pos_weight=of_classes, reduction="sum"
    )


def sum_squared_errors(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Sum the squared differences of numbers."""
    return F.mse_loss(pick(logits, targets), targets.values, reduction="sum")
