"""What transformers asks of every batch, answered on the host: it would wait for the GPU to hear the answer."""

from __future__ import annotations

from typing import Any

import torch

#: Whether the forward pass under way was given positions: only then may several documents share a row.
_has_positions = True


def answer_on_host(model: Any) -> None:
    """Have a causal model's masks made without a look at the positions, which lie on the GPU.

    transformers takes rows for packed ones where their positions restart. Where no positions are given it makes them itself,
    and they do not; where they are given, documents are told apart by them in any case, which is right for one document too.
    """
    from transformers import masking_utils

    masking_utils.find_packed_sequence_indices = _find_documents
    model.register_forward_pre_hook(_note_positions, with_kwargs=True)


def _note_positions(_: Any, __: tuple[Any, ...], named: dict[str, Any]) -> None:
    global _has_positions
    _has_positions = named.get("position_ids") is not None


def _find_documents(position_ids: torch.Tensor) -> torch.Tensor | None:
    """The number of each token's document in its row, or None where rows hold one each. Shapes: (rows, length)."""
    if not _has_positions:
        return None
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)
