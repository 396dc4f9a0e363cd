"""Noise on the input embeddings in training: NEFTune (https://arxiv.org/abs/2310.05914)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def add_noise(model: Any, alpha: float) -> None:
    """Let the input embeddings of a model get noise while it is in training mode.

    The noise is uniform in ``alpha / sqrt(tokens x width)``, as in transformers
    (``integrations/neftune.py``), where padding counts among the tokens of a row. It comes from
    torch's own generator, which the loop seeds for every step and rank (``Draw.dropout``). Layers
    that are recomputed in the backward pass begin behind the embeddings, so that it is drawn once.

    Args:
        model: The model with its adapters.
    """

    def disturb(module: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
        """Add noise to embeddings of shape (rows, tokens, width)."""
        if not module.training:
            return output
        limit = alpha / math.sqrt(output.shape[1] * output.shape[2])
        return output + output.new_empty(output.shape).uniform_(-limit, limit)

    model.get_input_embeddings().register_forward_hook(disturb)
