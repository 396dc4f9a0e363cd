"""What transformers decides about attention, where it decides slowly: by a look at the GPU, or for the slowest kernel."""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version

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


def group_heads_only_for_flash() -> None:
    """Have keys and values repeated for every head where only the math kernel would take them grouped.

    SDPA of torch before 2.14 takes grouped heads (``enable_gqa``) in FlashAttention's kernel, which is for 16 bits and for Ampere
    and later, and else in the math kernel, which holds every product of two tokens. Repeated, they fit the memory-efficient
    kernel, which takes them grouped from torch 2.14 on.
    """
    if Version(torch.__version__) >= Version("2.14"):
        return
    from transformers.integrations import sdpa_attention

    decide = sdpa_attention.use_gqa_in_sdpa
    if getattr(decide, "__name__", "") == "use_gqa_where_flash":
        return

    def use_gqa_where_flash(mask: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor) -> bool:
        if key.device.type == "cuda" and (
            key.dtype == torch.float32 or torch.cuda.get_device_capability(key.device)[0] < 8
        ):
            return False
        return bool(decide(mask, key, value))

    sdpa_attention.use_gqa_in_sdpa = use_gqa_where_flash  # type: ignore[assignment]
