"""Numbers of predictions as they are written: probabilities by class, rounded values."""

from __future__ import annotations

from collections.abc import Sequence

#: Digits of a number that is written, of the seven that fp32 has.
DIGITS = 6


def rounded(value: float) -> float:
    """Round to the digits that are written."""
    return float(f"{value:.{DIGITS}g}")


def name_scores(
    probabilities: Sequence[float], names: Sequence[str], top_k: int | None
) -> dict[str, float]:
    """Name the probabilities of classes, the most probable first; equal ones in their order.

    Args:
        probabilities: One per class.
        top_k: How many to name; None names all.
    """
    order = sorted(range(len(names)), key=lambda number: -probabilities[number])
    return {names[number]: rounded(probabilities[number]) for number in order[:top_k]}
