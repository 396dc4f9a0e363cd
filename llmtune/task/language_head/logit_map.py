"""The map from the logits of the output projection to those that a model returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

#: Logits that are put in the place of a model's own go from -SPAN to SPAN, where every soft cap is
#: reached.
_SPAN = 3000.0
#: Rows and tokens that a model is given.
_ROWS = (2, 3)
_POSITIONS = 6


@dataclass(frozen=True, slots=True)
class LogitMap:
    """Logits become ``cap * tanh(factor * logits / cap)``, or ``factor * logits`` without a cap.

    Cohere and Granite have a factor, Gemma has a soft cap, and most architectures have neither.
    """

    factor: float = 1.0
    cap: float | None = None

    def apply(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Map fp32 logits in place; return what :meth:`pull_back` needs, None without a cap."""
        if self.factor != 1.0:
            logits.mul_(self.factor)
        if self.cap is None:
            return None
        shares = logits.div_(self.cap).tanh_().clone()
        logits.mul_(self.cap)
        return shares

    def pull_back(self, gradient: torch.Tensor, shares: torch.Tensor | None) -> None:
        """Turn the gradient of mapped logits into that of the projection's, in place.

        Args:
            shares: What :meth:`apply` returned; it is overwritten.
        """
        if shares is not None:
            gradient.mul_(shares.square_().neg_().add_(1.0))
        if self.factor != 1.0:
            gradient.mul_(self.factor)


#: What most architectures do.
SAME = LogitMap()


def find_logit_map(model: Any) -> LogitMap | None:
    """Find out what a model does with its logits, by giving it logits that are known.

    The body is replaced by one that returns known hidden states, and the output projection by one
    that returns lines, so that nothing is computed, and weights may be on the meta device or
    partitioned. Every position has its own numbers.

    Args:
        model: A transformers model with an output projection, on any device.

    Returns:
        None where the model does anything else with its logits, or refuses empty ones, or calls the
        projection more than once or for anything but all hidden states, or has no body of its own.
    """
    head, body = model.get_output_embeddings(), _find_body(model)
    if head is None or body is None or not hasattr(head, "out_features"):
        return None
    line = torch.linspace(-_SPAN, _SPAN, head.out_features + 1)[1:]
    lines = line * (1.0 + torch.arange(_POSITIONS).reshape(*_ROWS, 1) / _POSITIONS)
    # A transform in front of the projection needs its hidden states beside its weights.
    for device in dict.fromkeys((torch.device("cpu"), head.weight.device)):
        hidden = torch.linspace(0.5, 2.0, _POSITIONS * head.in_features)
        hidden = hidden.reshape(*_ROWS, head.in_features).to(device)
        try:
            mapped = _run(model, body, head, hidden, lines.clone()).cpu().float()
            is_empty = _run(model, body, head, hidden, lines[..., :0]).shape == (*_ROWS, 0)
        except Exception:
            # Whatever a model does there that these tokens do not fit.
            continue
        if mapped.shape != lines.shape or not is_empty:
            return None
        largest = float(mapped.flatten()[-1])
        factor = largest / float(lines.flatten()[-1])
        candidates = (SAME, LogitMap(factor=factor), LogitMap(cap=largest))
        return next((one for one in candidates if _fits(one, lines, mapped)), None)
    return None


def _find_body(model: Any) -> Any:
    """Return the part of a model that has its input embeddings; None without one."""
    embeddings = model.get_input_embeddings()
    bodies = (
        child for child in model.children() if any(part is embeddings for part in child.modules())
    )
    return next(bodies, None)


def _fits(one: LogitMap, lines: torch.Tensor, mapped: torch.Tensor) -> bool:
    expected = lines.clone()
    one.apply(expected)
    return torch.allclose(expected, mapped, rtol=1e-5, atol=1e-5)


def _run(
    model: Any, body: Any, head: Any, hidden: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor:
    """Run what a model does around its body and its output projection, on given logits.

    Raises:
        ValueError: The projection is not called once, with all hidden states.
    """
    given: list[torch.Tensor] = []

    def project(_: Any, states: torch.Tensor) -> torch.Tensor:
        given.append(states)
        return logits

    with (
        torch.no_grad(),
        _replaced(body, lambda *_, **__: _BodyOutput(hidden)),
        _replaced(head, project),
    ):
        # Hooks of the model itself are about its inputs.
        output = type(model).forward(model, input_ids=torch.zeros(_ROWS, dtype=torch.long))
    (states,) = given
    if states.shape != hidden.shape:
        raise ValueError(f"the output projection is given {tuple(states.shape)}")
    mapped: torch.Tensor = output.logits
    return mapped


@contextmanager
def _replaced(module: Any, forward: Any) -> Iterator[None]:
    """Give a module another ``__call__``, past its hooks."""
    before = module.__class__
    module.__class__ = type(before.__name__, (before,), {"__call__": forward})
    try:
        yield
    finally:
        module.__class__ = before


class _BodyOutput(dict[str, Any]):
    """The output of any body: hidden states, and None for whatever else an architecture has."""

    def __init__(self, hidden: torch.Tensor):
        super().__init__(last_hidden_state=hidden)
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return (self.last_hidden_state,)[key]
        return self.last_hidden_state if key == 0 else self.get(key)
