"""Corrections of transformers' attention: its masks and its choice of a kernel.

transformers waits for the GPU to make masks, ignores the borders of documents that share a row for
some architectures, and takes the slowest kernel for grouped heads.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version


@dataclass(frozen=True, slots=True)
class _Pass:
    """The arguments of a forward pass."""

    positions: torch.Tensor | None
    """int64, shape (rows, length); without them every row holds one document."""
    masked: bool
    """True if the caller gave an attention mask."""


#: The current pass of a model that was given to :func:`answer_on_host`.
_pass: _Pass | None = None

#: Functions of transformers that make masks, by the names under which models import them.
_MASK_MAKERS = (
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "create_chunked_causal_mask",
)


def answer_on_host(model: Any) -> None:
    """Make a causal model's masks respect document borders, without reading positions on the GPU.

    transformers treats rows as packed where their positions restart. If no positions are given, it
    makes them itself, and they do not restart; if they are given, documents are separated by them
    in any case, which is right for one document too.

    Architectures such as OPT, MPT, BLOOM and gpt-oss take positions and do not pass them to the
    functions that make their masks, or pass their own mask of ones, so that the documents of a
    row would see each other. Those functions get the positions here. What is mixed nevertheless,
    such as the state of a recurrent layer, is found by
    :mod:`llmtune.train.hooks.packing_probe`.
    """
    from transformers import masking_utils, modeling_flash_attention_utils

    find = masking_utils.find_packed_sequence_indices
    if not hasattr(find, "knows_borders"):
        masking_utils.find_packed_sequence_indices = _without_a_look(find)
    # FlashAttention's function checks them in every layer.
    ask = modeling_flash_attention_utils._is_packed_sequence
    if not hasattr(ask, "knows_borders"):
        modeling_flash_attention_utils._is_packed_sequence = _without_asking(ask)
    for name in {type(module).__module__ for module in model.modules()}:
        source = sys.modules.get(name)
        for maker in _MASK_MAKERS:
            make = getattr(source, maker, None)
            if make is not None and not hasattr(make, "knows_borders"):
                setattr(source, maker, _with_borders(make))
    model.register_forward_pre_hook(_note_inputs, with_kwargs=True)
    # A pass of another model without positions must not find these.
    model.register_forward_hook(_forget_inputs, always_call=True)


def _with_borders(make: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a maker of masks, and give it the positions that its model does not pass on."""
    signature = inspect.signature(make)

    @functools.wraps(make)
    def make_with_borders(*arguments: Any, **named: Any) -> Any:
        values = signature.bind_partial(*arguments, **named).arguments
        shape = values["inputs_embeds"].shape[:2]
        positions = _pass.positions if _pass else None
        if (
            _pass
            and positions is not None
            and values.get("past_key_values") is None
            and positions.shape == shape
        ):
            values["position_ids"] = positions
            if not _pass.masked:
                values["attention_mask"] = None
        return make(**values)

    make_with_borders.knows_borders = True  # type: ignore[attr-defined]
    return make_with_borders


def _note_inputs(_: Any, __: tuple[Any, ...], named: dict[str, Any]) -> None:
    global _pass
    _pass = _Pass(named.get("position_ids"), named.get("attention_mask") is not None)


def _forget_inputs(_: Any, __: tuple[Any, ...], ___: Any) -> None:
    global _pass
    _pass = None


def _without_a_look(find: Callable[..., Any]) -> Callable[..., Any]:
    def find_documents(position_ids: torch.Tensor) -> torch.Tensor | None:
        """Return the index of each token's document in its row, or None if rows hold one each.

        Shapes: (rows, length).
        """
        if _pass is None:
            documents: torch.Tensor | None = find(position_ids)
            return documents
        if _pass.positions is None:
            return None
        steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
        return (steps != 1).cumsum(-1)

    find_documents.knows_borders = True  # type: ignore[attr-defined]
    return find_documents


def _without_asking(ask: Callable[..., Any]) -> Callable[..., Any]:
    def is_packed(position_ids: torch.Tensor | None, batch_size: int) -> Any:
        """Tell whether the positions, shape (1, length), restart."""
        if _pass is not None and _pass.positions is None:
            # The model made them itself.
            return False
        return ask(position_ids, batch_size)

    is_packed.knows_borders = True  # type: ignore[attr-defined]
    return is_packed


def group_heads_only_for_flash() -> None:
    """Repeat keys and values for every head where only the math kernel would take them grouped.

    SDPA of torch before 2.14 takes grouped heads (``enable_gqa``) in FlashAttention's kernel, which
    is for 16 bits and for Ampere and later, and else in the math kernel, which holds every product
    of two tokens. Repeated, they fit the memory-efficient kernel, which takes them grouped from
    torch 2.14 on.
    """
    if Version(torch.__version__) >= Version("2.14"):
        return
    from transformers.integrations import sdpa_attention

    decide = sdpa_attention.use_gqa_in_sdpa
    if getattr(decide, "__name__", "") == "use_gqa_where_flash":
        return

    def use_gqa_where_flash(
        mask: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor
    ) -> bool:
        if key.device.type == "cuda" and (
            key.dtype == torch.float32 or torch.cuda.get_device_capability(key.device)[0] < 8
        ):
            return False
        return bool(decide(mask, key, value))

    sdpa_attention.use_gqa_in_sdpa = use_gqa_where_flash  # type: ignore[assignment]
