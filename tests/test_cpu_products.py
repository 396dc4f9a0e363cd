"""Products in 16 bits on a CPU without them: those of fp32, rounded once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from llmtune import cpu_products

NAMES = ("mm", "bmm", "addmm", "baddbmm")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64)


def draw(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    batch = (2,) if name in ("bmm", "baddbmm") else ()
    shapes = [(*batch, 3, 5), (*batch, 5, 4)]
    if "add" in name:
        # A bias, which is broadcast.
        shapes.insert(0, (*batch, 1, 4))
    return tuple((4 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_is_that_of_fp32_rounded_once(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_products, "lacks_products", lambda dtype: dtype.itemsize == 2)
    multiply = cpu_products._in_fp32(getattr(torch.ops.aten, name).out)
    tensors, plain = draw(name, dtype), getattr(torch, name)
    found = multiply(*tensors)
    wide = tuple(one.float() for one in tensors) if dtype.itemsize == 2 else tensors
    assert torch.equal(found, plain(*wide).to(dtype))
    if "add" in name and dtype.is_floating_point:
        scaled = multiply(*tensors, beta=0.5, alpha=2.0)
        assert torch.equal(scaled, plain(*wide, beta=0.5, alpha=2.0).to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_different_dtypes_are_refused_as_ever(name: str) -> None:
    *others, last = draw(name, torch.bfloat16)
    multiply = cpu_products._in_fp32(getattr(torch.ops.aten, name).out)
    with pytest.raises(RuntimeError):
        multiply(*others, last.float())


def test_a_layer_and_its_gradients_are_those_of_fp32_within_rounding() -> None:
    """In a process of this suite the replacement stays; it must do no harm to the others."""
    cpu_products.multiply_in_fp32()
    cpu_products.multiply_in_fp32()
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        generator = torch.Generator().manual_seed(1)
        layer = torch.randn(16, 32, generator=generator).to(dtype).requires_grad_()
        bias = torch.randn(16, generator=generator).to(dtype).requires_grad_()
        hidden = torch.randn(2, 7, 32, generator=generator).to(dtype).requires_grad_()
        F.linear(hidden, layer, bias).square().mean().backward()
        found.append([one.grad for one in (layer, bias, hidden)])
    for half, single in zip(*found, strict=True):
        assert half is not None
        assert half.dtype is torch.bfloat16
        torch.testing.assert_close(half.float(), single, rtol=0.05, atol=0.02)
