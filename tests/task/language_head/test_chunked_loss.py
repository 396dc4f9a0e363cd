"""The chunked loss equals torch's cross entropy of all logits, and so do its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.task.language_head.chunked_loss import HeadLossSettings, sum_head_losses
from llmtune.task.language_head.logit_map import LogitMap

WORDS, WIDTH = 37, 12
MAPS = [LogitMap(), LogitMap(factor=0.25), LogitMap(cap=3.0)]


def draw(count: int, bias: bool, seed: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, WIDTH, generator=generator)
    weight = torch.randn(WORDS, WIDTH, generator=generator)
    offsets = torch.randn(WORDS, generator=generator) if bias else None
    values = torch.randint(0, WORDS, (count,), generator=generator)
    tensors = [one if one is None else one.to(dtype) for one in (hidden, weight, offsets)]
    return [*(one if one is None else one.requires_grad_() for one in tensors), values]


def _in_fp64(one: torch.Tensor | None) -> Any:
    return one if one is None else one.detach().double().requires_grad_()


def _sum(inputs: list[Any], about: HeadLossSettings) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight, bias, values = inputs
    return sum_head_losses(hidden, weight, bias, values, about)


def reference(inputs: list[Any], logit_map: LogitMap, smoothing: float) -> tuple[Any, Any]:
    """The loss in fp64 and the gradients of the inputs, by torch."""
    hidden, weight, bias = (_in_fp64(one) for one in inputs[:3])
    logits = F.linear(hidden, weight, bias) * logit_map.factor
    if logit_map.cap is not None:
        logits = logit_map.cap * torch.tanh(logits / logit_map.cap)
    loss = F.cross_entropy(logits, inputs[3], reduction="sum", label_smoothing=smoothing)
    loss.backward()
    return loss.detach(), [one if one is None else one.grad for one in (hidden, weight, bias)]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 20),
    rows=st.integers(1, 25),
    bias=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    logit_map=st.sampled_from(MAPS),
    summed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_it_is_torchs_loss_whatever_the_chunks(
    count: int,
    rows: int,
    bias: bool,
    smoothing: float,
    logit_map: LogitMap,
    summed: bool,
    seed: int,
) -> None:
    inputs = draw(count, bias, seed)
    about = HeadLossSettings(
        logit_map=logit_map,
        smoothing=smoothing,
        counts=True,
        chunk_logits=rows * WORDS,
        summed_bytes=10**9 if summed else 0,
    )
    loss, correct = _sum(inputs, about)
    (loss * 0.37).backward()
    expected, gradients = reference(inputs, logit_map, smoothing)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=1e-5)
    for one, gradient in zip(inputs[:3], gradients, strict=True):
        if one is not None:
            torch.testing.assert_close(one.grad.double(), 0.37 * gradient, rtol=1e-5, atol=1e-5)
    hidden, weight, offsets, values = inputs
    likeliest = F.linear(hidden, weight, offsets).argmax(-1)
    assert int(correct) == int((likeliest == values).sum())


@pytest.mark.parametrize("trained", [(True, False), (False, True), (True, True), (False, False)])
def test_only_what_is_trained_has_a_gradient(trained: tuple[bool, bool]) -> None:
    hidden, weight, _, values = draw(9, False, 1)
    for one, is_trained in zip((hidden, weight), trained, strict=True):
        one.requires_grad_(is_trained)
    about = HeadLossSettings(chunk_logits=4 * WORDS)
    loss, _ = sum_head_losses(hidden, weight, None, values, about)
    assert loss.requires_grad == any(trained)
    if any(trained):
        loss.backward()
    assert [one.grad is not None for one in (hidden, weight)] == list(trained)


@pytest.mark.parametrize("summed_bytes", [0, 10**9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_rounded_once(dtype: torch.dtype, summed_bytes: int) -> None:
    """As near to fp64 as torch's loss of logits that are converted to fp32, or nearer."""
    inputs = draw(64, True, 3, dtype)
    about = HeadLossSettings(chunk_logits=16 * WORDS, summed_bytes=summed_bytes)
    loss, _ = _sum(inputs, about)
    loss.backward()
    expected, gradients = reference(inputs, LogitMap(), 0.0)
    ours = [one.grad.double() for one in inputs[:3]]

    plain = [one.detach().requires_grad_() for one in inputs[:3]]
    theirs = F.cross_entropy(F.linear(*plain).float(), inputs[3], reduction="sum")
    theirs.backward()
    assert loss.dtype is torch.float32
    assert abs(loss - expected) <= abs(theirs - expected) + 1e-3
    for mine, plainly, exact in zip(ours, plain, gradients, strict=True):
        error = (mine - exact).norm() / exact.norm()
        assert error <= 1.1 * (plainly.grad.double() - exact).norm() / exact.norm()


def test_small_probabilities_survive_fp16() -> None:
    """A loss scale multiplies what is already there; fp16 has nothing below 6e-8."""
    hidden = torch.tensor([[1.0]], dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[0.0], [-16.5]], dtype=torch.float16)
    loss, _ = sum_head_losses(hidden, weight, None, torch.tensor([0]), HeadLossSettings())
    (loss * 2.0**14).backward()
    share = torch.sigmoid(torch.tensor(-16.5, dtype=torch.float64))
    assert hidden.grad is not None
    assert float(hidden.grad) == pytest.approx(float(-share * 16.5 * 2**14), rel=2e-3)


def test_a_second_backward_pass_is_refused() -> None:
    inputs = draw(5, False, 0)
    loss, _ = _sum(inputs, HeadLossSettings())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_memory_is_that_of_a_chunk() -> None:
    """At most one byte per logit of what 128,256 words have, of which today's loss takes 14."""
    from torch.utils._python_dispatch import TorchDispatchMode

    count, words, width = 1024, 128_256, 64
    hidden = torch.randn(count, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(words, width, dtype=torch.bfloat16)
    values = torch.zeros(count, dtype=torch.long)
    largest = [0]

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.shape[:1] != (words,):
                largest[0] = max(largest[0], made.untyped_storage().nbytes())
            return made

    mode: Any = Largest()  # type: ignore[no-untyped-call]
    with mode:
        loss, _ = sum_head_losses(hidden, weight, None, values, HeadLossSettings())
        loss.backward()
    assert largest[0] <= 4 * 2**24
