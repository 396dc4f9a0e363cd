"""The summed cross entropy of an output projection, without all its logits at a time.

Logits are made for a few positions at a time and turned into their own gradient in place, so that
the gradients are known when the forward pass ends. The upstream gradient is one number, with which
the backward pass multiplies them.

The gradient of a large projection is not added up over positions, which would take it in fp32.
There the forward pass makes the logits of all positions a second time, for a few words at a time,
of which each has its whole gradient at once.

The formula is that of ``torch.nn.functional.cross_entropy``; sums over the vocabulary and over
positions are in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.autograd.function import once_differentiable

from llmtune.cpu_products import lacks_products
from llmtune.task.language_head.chunks import ChunkSizes
from llmtune.task.language_head.logit_map import SAME, LogitMap

#: Gradients of fp16 are scaled up by the loss scale in the backward pass, which comes too late for
#: small probabilities: until then they are scaled by this.
_FP16_SCALE = 1024.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadLossSettings(ChunkSizes):
    """The settings of a loss, and how much of it is computed at a time."""

    logit_map: LogitMap = SAME
    smoothing: float = 0.0
    """Share of a target that is spread over all words, itself included."""
    counts: bool = False
    """Count the targets that are the likeliest word, too."""


def sum_head_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    values: torch.Tensor,
    settings: HeadLossSettings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the cross entropy of the words that follow.

    Args:
        hidden: Hidden states of the judged positions, of shape (targets, hidden size).
        weight: Of the output projection, of shape (words, hidden size).
        bias: Of shape (words,).
        values: The words, int64, of shape (targets,).

    Returns:
        The loss in fp32, a scalar; and how often the word was the likeliest, int64, a scalar, 0
        unless ``settings.counts``.
    """
    found: tuple[torch.Tensor, torch.Tensor] = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, values, settings, torch.is_grad_enabled()
    )
    return found


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        values: torch.Tensor,
        settings: HeadLossSettings,
        needs_gradients: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needed = ctx.needs_input_grad[:3] if needs_gradients else (False, False, False)
        head = _Head(hidden, weight, bias, needed)
        # A bias is small, and alone is added up whatever the projection.
        is_summed = not needed[1] or settings.sums_over_positions(weight.numel())
        losses, totals, correct = _walk_positions(head, values, settings, any(needed) and is_summed)
        if any(needed) and not is_summed:
            _walk_words(head, values, totals, settings)
        ctx.gradients = head.gradients()
        ctx.mark_non_differentiable(correct)
        return losses.sum(), correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the loss of an output projection has one backward pass")
        made, ctx.gradients = ctx.gradients, None
        scaled = [one if one is None else one.mul_(gradient).to(dtype) for one, dtype in made]
        return *scaled, None, None, None


def _walk_positions(
    head: _Head, values: torch.Tensor, settings: HeadLossSettings, adds_gradients: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the losses, a few positions at a time.

    Returns:
        The losses and the logarithms of the sums of the exponentials, both in fp32 of shape
        (targets,); and the count of likeliest words.
    """
    count = len(values)
    losses = torch.empty(count, dtype=torch.float32, device=values.device)
    totals = torch.empty_like(losses)
    correct = torch.zeros((), dtype=torch.long, device=values.device)
    rows = settings.chunk_size(head.words, values.device.type)
    for first in range(0, count, rows):
        chunk = slice(first, min(count, first + rows))
        targets, smoothing = values[chunk], settings.smoothing
        logits = head.logits(chunk, slice(None))
        shares = settings.logit_map.apply(logits)
        if settings.counts:
            correct += (logits.argmax(-1) == targets).sum()

        # The cross entropy, of logits that become exponentials in place.
        largest = logits.amax(-1)
        logits.sub_(largest[:, None])
        of_targets = logits.gather(-1, targets[:, None]).squeeze(-1)
        mean = logits.mean(-1) if smoothing else 0.0
        total = logits.exp_().sum(-1)
        losses[chunk] = total.log() - (1.0 - smoothing) * of_targets - smoothing * mean
        totals[chunk] = total.log() + largest

        if adds_gradients:
            gradient = logits.div_(total[:, None])
            _subtract_targets(gradient, targets, smoothing, head.words)
            settings.logit_map.pull_back(gradient, shares)
            head.add_positions(gradient, chunk, is_only=rows >= count)
    return losses, totals, correct


def _walk_words(
    head: _Head, values: torch.Tensor, totals: torch.Tensor, settings: HeadLossSettings
) -> None:
    """Find the gradients, a few words at a time.

    Args:
        totals: Logarithms of the sums of the exponentials, in fp32, of shape (targets,).
    """
    words = settings.chunk_size(max(len(values), head.width), values.device.type)
    for first in range(0, head.words, words):
        block = slice(first, min(head.words, first + words))
        logits = head.logits(slice(None), block)
        shares = settings.logit_map.apply(logits)
        gradient = logits.sub_(totals[:, None]).exp_()
        _subtract_targets(gradient, values - first, settings.smoothing, head.words)
        settings.logit_map.pull_back(gradient, shares)
        head.add_words(gradient, block)


def _subtract_targets(
    gradient: torch.Tensor, values: torch.Tensor, smoothing: float, words: int
) -> None:
    """Turn probabilities into the gradient of the cross entropy, in place.

    Args:
        gradient: In fp32, of shape (positions, some of the words).
        values: Of shape (positions,); may be no index of these words.
        words: All words.
    """
    if smoothing:
        gradient.sub_(smoothing / words)
    last = gradient.shape[-1] - 1
    is_here = (values >= 0) & (values <= last)
    share = (smoothing - 1.0) * is_here.to(gradient.dtype)
    gradient.scatter_add_(-1, values.clamp(0, last)[:, None], share[:, None])


class _Head:
    """An output projection at some positions: parts of its logits, and its gradients."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        needed: tuple[bool, ...],
    ):
        """Args:
        needed: Whether the hidden states, the weight and the bias need a gradient.
        """
        self.words, self.width = weight.shape
        self._dtype = hidden.dtype
        if hidden.device.type == "cpu" and lacks_products(hidden.dtype):
            hidden, weight = hidden.float(), weight.float()
            bias = bias.float() if bias is not None else None
        self._hidden, self._weight, self._bias = hidden, weight, bias
        self._scale = _FP16_SCALE if hidden.dtype is torch.float16 else 1.0
        # bf16 has the range of fp32; fp16 waits for its loss scale.
        self._kept = torch.float32 if self._dtype is torch.float16 else self._dtype
        self._of_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needed[0] else None
        self._of_weight: torch.Tensor | None = None
        if needed[1]:
            self._of_weight = torch.empty(0, device=weight.device)
        self._of_bias = (
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None
        )

    def logits(self, positions: slice, words: slice) -> torch.Tensor:
        """Return fp32 logits, which may be overwritten."""
        bias = self._bias[words] if self._bias is not None else None
        return F.linear(self._hidden[positions], self._weight[words], bias).float()

    def add_positions(self, of_logits: torch.Tensor, positions: slice, *, is_only: bool) -> None:
        """Add the gradients of some positions, for all words.

        Args:
            of_logits: In fp32, of shape (positions, words).
            is_only: There are no other positions.
        """
        rounded = self._round(of_logits, slice(None))
        if self._of_hidden is not None:
            self._of_hidden[positions] = rounded @ self._weight
        if self._of_weight is None:
            return
        hidden = self._hidden[positions]
        if is_only and self._kept is not torch.float32:
            self._of_weight = rounded.t() @ hidden
            return
        if self._of_weight.numel() == 0:
            self._of_weight = torch.zeros_like(self._weight, dtype=torch.float32)
        if hidden.dtype is torch.float32:
            self._of_weight.addmm_(rounded.t(), hidden)
        else:
            self._of_weight += _fp32_product(rounded.t(), hidden)

    def add_words(self, of_logits: torch.Tensor, words: slice) -> None:
        """Add the gradients of some words, of all positions.

        Args:
            of_logits: In fp32, of shape (positions, words).
        """
        rounded = self._round(of_logits, words)
        if self._of_hidden is not None:
            self._of_hidden += _fp32_product(rounded, self._weight[words])
        if self._of_weight is not None:
            if self._of_weight.numel() == 0:
                self._of_weight = torch.empty_like(self._weight, dtype=self._kept)
            # Whole, and so rounded once.
            block = self._of_weight[words]
            if self._kept is rounded.dtype:
                torch.mm(rounded.t(), self._hidden, out=block)
            else:
                block.copy_(_fp32_product(rounded.t(), self._hidden))

    def gradients(self) -> list[tuple[torch.Tensor | None, torch.dtype]]:
        """Return each input's gradient, or None, and the dtype that it is converted to."""
        if self._of_weight is not None and self._of_weight.numel() == 0:
            # There was no position.
            self._of_weight = torch.zeros_like(self._weight, dtype=self._kept)
        for scaled in (self._of_hidden, self._of_weight):
            if scaled is not None and self._scale != 1.0:
                scaled.div_(self._scale)
        return [
            (one if one is None else one.to(self._kept), self._dtype)
            for one in (self._of_hidden, self._of_weight, self._of_bias)
        ]

    def _round(self, of_logits: torch.Tensor, words: slice) -> torch.Tensor:
        """Convert the gradient of logits to the dtype of the products, and add that of the bias."""
        if self._of_bias is not None:
            self._of_bias[words] += of_logits.sum(0)
        if self._scale != 1.0:
            of_logits.mul_(self._scale)
        return of_logits.to(self._weight.dtype)


def _fp32_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Multiply matrices without rounding the result."""
    if left.device.type == "cuda" and left.dtype is not torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
