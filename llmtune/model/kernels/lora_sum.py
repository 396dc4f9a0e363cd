"""Add a LoRA adapter to its layer's output in one product.

peft computes ``base(x) + B(A(x)) * scale``: it writes the wide output of B, writes it again scaled,
and writes the sum. A product that is added to what is there (``addmm``) writes the sum alone and
rounds it once. Backwards the scale meets A's narrow output instead of the layer's wide one.
"""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from llmtune.draws import Draw, generator
from llmtune.model.kernels.replacement import Compute, Replacement, is_same

KIND = "LoRA sum"
#: Rows and outputs of the layer on which each kind of adapter is tried.
_TRIED_ROWS, _TRIED_OUTPUTS = 24, 96


class AddedProduct(torch.autograd.Function):
    """``base + inner @ weight.T * scale``."""

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        inner: torch.Tensor,
        weight: torch.Tensor,
        scale: float,
        in_place: bool,
    ) -> torch.Tensor:
        """Compute the sum.

        Args:
            base: The layer's output, shape (..., outputs).
            inner: A's output, shape (..., rank).
            weight: B's weight, shape (outputs, rank). It is saved itself and not a view of it, so
                that ZeRO 3 can take its values away and bring them back.
            in_place: Write the sum over ``base``.
        """
        ctx.save_for_backward(inner, weight)
        ctx.scale = scale
        narrow, rows = inner.reshape(-1, inner.shape[-1]), base.reshape(-1, base.shape[-1])
        if in_place:
            rows.addmm_(narrow, weight.t(), alpha=scale)
            ctx.mark_dirty(base)
            return base
        return torch.addmm(rows, narrow, weight.t(), alpha=scale).view(base.shape)

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, None, None]:
        """Compute the gradients of base, inner and weight."""
        inner, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_inner = of_weight = None
        if ctx.needs_input_grad[1]:
            of_inner = (rows @ weight).mul_(ctx.scale).view(inner.shape)
        if ctx.needs_input_grad[2]:
            of_weight = (rows.t() @ inner.reshape(-1, inner.shape[-1])).mul_(ctx.scale)
        return gradient, of_inner, of_weight, None, None


#: ``base + inner @ weight.T * scale``, by the arguments of :meth:`AddedProduct.forward`.
add_product: Compute = AddedProduct.apply


def find_sums(model: nn.Module, dtype: torch.dtype, device: torch.device) -> list[Replacement]:
    """Find peft's plain LoRA layers, and describe their replacements.

    DoRA and other variants, several adapters and biases of B keep peft's forward.

    Args:
        dtype: The training dtype.
        device: The device of the run.
    """
    # Without peft there is no such layer, and its import takes a second.
    layers = sys.modules.get("peft.tuners.lora.layer")
    if layers is None:
        return []
    proved: dict[tuple[int, float], bool] = {}
    found: list[Replacement] = []
    for name, module in model.named_modules():
        if type(module) is not layers.Linear or not _is_plain(module):
            continue
        (adapter,) = module.active_adapters
        key = (module.r[adapter], module.scaling[adapter])
        if key not in proved:
            proved[key] = _is_right(*key, dtype, device)
        if proved[key]:
            found.append(_replace(module, name))
    return found


def _is_plain(layer: Any) -> bool:
    names = list(layer.lora_A)
    return (
        len(names) == 1
        and names == list(layer.active_adapters)
        and not layer.lora_variant
        and not layer.lora_bias[names[0]]
        and not layer.merged
        and not layer.disable_adapters
        and "forward" not in layer.__dict__
        and all("forward" not in part[names[0]].__dict__ for part in (layer.lora_A, layer.lora_B))
    )


def _replace(layer: Any, name: str) -> Replacement:
    """Describe the sum in the place of a layer's forward; B's takes two more arguments then."""
    (adapter,) = layer.active_adapters
    outer = layer.lora_B[adapter]
    plain = MethodType(type(layer).forward, layer)

    def put(compute: Compute) -> None:
        for module in (layer, outer):
            module.__dict__.pop("forward", None)
        if compute is not plain:
            layer.__dict__["forward"] = compute
            outer.__dict__["forward"] = MethodType(_project, outer)

    return Replacement(
        name=name,
        kind=KIND,
        plain=plain,
        fast=MethodType(_add, layer),
        put=put,
        is_proved=True,
    )


def _add(layer: Any, x: torch.Tensor, *others: Any, **named: Any) -> Any:
    """Stand for the forward of peft's layer, which is asked where more is wanted."""
    names = layer.active_adapters
    if (
        others
        or named
        or layer.disable_adapters
        or layer.merged
        or len(names) != 1
        or names[0] not in layer.lora_A
    ):
        return type(layer).forward(layer, x, *others, **named)
    inner, outer = layer.lora_A[names[0]], layer.lora_B[names[0]]
    base, scale = layer.base_layer(x), layer.scaling[names[0]]
    dropped = layer.lora_dropout[names[0]](layer._cast_input_dtype(x, inner.weight.dtype))
    narrow = inner(dropped)
    if narrow.dtype is not base.dtype:
        return (base + outer(narrow) * scale).to(base.dtype)
    # Nothing else may hold what is written over: a hook, as ZeRO 3 has them, might.
    in_place = (
        not torch.compiler.is_compiling()
        and type(layer.base_layer) is nn.Linear
        and not layer.base_layer._forward_hooks
        and not base._is_view()
    )
    # B is called as a module, because ZeRO 3 gathers its weight then.
    return outer(narrow, base, scale, in_place)


def _project(
    outer: Any,
    inner: torch.Tensor,
    base: torch.Tensor | None = None,
    scale: float = 1.0,
    in_place: bool = False,
) -> Any:
    """Stand for B's forward: with a base, the sum."""
    if base is None:
        return functional.linear(inner, outer.weight)
    return add_product(base, inner, outer.weight, scale, in_place)


def _is_right(rank: int, scale: float, dtype: torch.dtype, device: torch.device) -> bool:
    """Compare the sum with the formula of peft, in values and gradients."""
    draw = generator(0, Draw.kernel_check, rank)
    rows, outputs = _TRIED_ROWS, _TRIED_OUTPUTS

    def tensor(*shape: int) -> torch.Tensor:
        values = torch.from_numpy(draw.normal(size=shape))
        return values.to(device, dtype).requires_grad_()

    base, inner, weight = tensor(rows, outputs), tensor(rows, rank), tensor(outputs, rank)

    def plain(base: torch.Tensor, inner: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return base + functional.linear(inner, weight) * scale

    def fast(base: torch.Tensor, inner: torch.Tensor, weight: torch.Tensor) -> Any:
        return add_product(base.clone(), inner, weight, scale, True)

    return is_same(plain, fast, [base, inner, weight])
