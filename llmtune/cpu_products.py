"""Products of 16-bit matrices on a CPU that has no instructions for them.

There torch multiplies number by number: forward and backward pass of a linear layer in bf16 took
14 times as long as in fp32 (AVX2, torch 2.13). A product of numbers that are converted to fp32, and
rounded once, is the same product with a better sum.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: torch drops a replacement together with the library that made it.
_replaced: list[torch.library.Library] = []


@cache
def lacks_products(dtype: torch.dtype) -> bool:
    """Tell whether this CPU multiplies matrices of a dtype number by number."""
    import torch

    ask = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }.get(dtype)
    return ask is not None and not ask()


def multiply_in_fp32() -> None:
    """Multiply 16-bit matrices of this process in fp32 where the CPU lacks their products.

    It replaces the four functions in which layers, eager attention and their gradients end.
    """
    import torch

    if _replaced or not (lacks_products(torch.bfloat16) or lacks_products(torch.float16)):
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # That a kernel is replaced is what is asked for.
        warnings.simplefilter("ignore", UserWarning)
        for name in ("mm", "bmm", "addmm", "baddbmm"):
            library.impl(name, _in_fp32(getattr(torch.ops.aten, name).out), "CPU")
    _replaced.append(library)


def _in_fp32(multiply_into: Any) -> Callable[..., torch.Tensor]:
    """Make a product from the function that writes it into a tensor."""

    def multiply(*tensors: torch.Tensor, **factors: float) -> torch.Tensor:
        left, right = tensors[-2:]
        shape = (*left.shape[:-1], right.shape[-1])
        # torch itself refuses tensors of different dtypes.
        if lacks_products(right.dtype) and all(one.dtype is right.dtype for one in tensors):
            wide = [one.float() for one in tensors]
            product = multiply_into(*wide, **factors, out=wide[-1].new_empty(shape))
            rounded: torch.Tensor = product.to(right.dtype)
            return rounded
        result: torch.Tensor = multiply_into(*tensors, **factors, out=left.new_empty(shape))
        return result

    return multiply
