"""Whether two runs are the same run: their losses, and how much they learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

#: Largest relative difference of a loss.
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
#: Largest relative difference of the fall of the held-out loss. In bf16 the tolerance of the losses
#: is as large as what an adapter learns in three steps, so that it alone would not notice an
#: optimizer that does nothing.
FALL_TOLERANCE = 0.25


@dataclass(frozen=True, slots=True)
class Curve:
    """What a run computed."""

    losses: list[float]
    """Of the training steps."""
    before: float
    """Held-out loss before the first step."""
    after: float
    """Held-out loss after the last step."""

    @property
    def fall(self) -> float:
        """How much the run learned."""
        return self.before - self.after

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the report."""
        return {"losses": self.losses, "held_out_loss": self.after, "fall": self.fall}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a check found; without problems it passed."""

    measured: Any
    expected: Any
    tolerance: Any
    problems: list[str] = field(default_factory=list)


def relative_difference(measured: float, expected: float) -> float:
    """Of a number that should not be zero; infinite where one of the two is not a number."""
    if not (math.isfinite(measured) and math.isfinite(expected)) or expected == 0:
        return math.inf
    return abs(measured - expected) / abs(expected)


def compare_losses(
    measured: Sequence[float], expected: Sequence[float], tolerance: float
) -> list[str]:
    """What is wrong with the losses of the steps."""
    if len(measured) != len(expected) or not expected:
        return [f"{len(measured)} losses were measured and {len(expected)} were expected"]
    found = []
    for step, (own, other) in enumerate(zip(measured, expected, strict=True), 1):
        difference = relative_difference(own, other)
        if not difference <= tolerance:
            found.append(
                f"the loss of step {step} is {own:.6g} instead of {other:.6g} ({difference:.1e}"
                " apart)"
            )
    return found


def compare_curves(measured: Curve, expected: Curve, precision: str) -> Verdict:
    """The losses of all steps, the held-out loss, and its fall."""
    tolerance = LOSS_TOLERANCE[precision]
    problems = compare_losses(measured.losses, expected.losses, tolerance)
    problems += compare_number("the held-out loss", measured.after, expected.after, tolerance)
    problems += compare_number(
        "the fall of the held-out loss", measured.fall, expected.fall, FALL_TOLERANCE
    )
    tolerances = {"losses": tolerance, "held_out_loss": tolerance, "fall": FALL_TOLERANCE}
    return Verdict(
        measured=measured.to_dict(),
        expected=expected.to_dict(),
        tolerance=tolerances,
        problems=problems,
    )


def compare_number(name: str, measured: float, expected: float, tolerance: float) -> list[str]:
    """What is wrong with one number."""
    difference = relative_difference(measured, expected)
    if difference <= tolerance:
        return []
    return [f"{name} is {measured:.6g} instead of {expected:.6g} ({difference:.1e} apart)"]
