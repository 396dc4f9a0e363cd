"""The layers of a model whose activations are computed a second time in the backward pass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RecomputedLayers:
    """The first ``count`` of the layers that a gradient reaches keep their input alone."""

    count: int = 0
    total: int = 0
    """The layers that a gradient reaches."""

    @property
    def share(self) -> float:
        """Return the recomputed share of the layers that a gradient reaches, 0 to 1."""
        return self.count / self.total if self.total else 0.0

    @property
    def is_partial(self) -> bool:
        """Tell whether some layers keep their activations and others do not."""
        return 0 < self.count < self.total

    def describe(self) -> str:
        """Describe them in a word or two."""
        if self.is_partial:
            return f"{self.count} of {self.total} layers"
        return "on" if self.count else "off"
