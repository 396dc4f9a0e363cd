"""The part of an optimizer that updates a matrix as a whole, and not element by element.

ZeRO cuts matrices anywhere. The engine puts the pieces of one together on one rank, and sends the
direction of its step back (:mod:`llmtune.engine.matrix_optimizer`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from llmtune.optimizer.optimizer import Update

#: The entry of a torch optimizer's group whose parameters are updated by the matrix rule.
IS_MATRICES = "is_matrices"


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixRule:
    """How the matrices of layers are updated; all other parameters are updated by element."""

    title: str
    """Its name for people, beside that of the rule for all others."""
    states: tuple[str, ...]
    """Names of its fp32 tensors, each of the parameter's shape, in torch's state and in files."""
    blend: Callable[[Update], None]
    """Update the states element by element, and make the gradients what ``direct`` gets."""
    direct: Callable[[torch.Tensor], torch.Tensor]
    """Return the direction of a step, which the learning rate multiplies.

    Both are fp32, of shape (matrices, rows, columns).
    """
