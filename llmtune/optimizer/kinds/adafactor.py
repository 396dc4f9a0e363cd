"""Adafactor: second moments of rows and columns in place of elements, and no first moment.

See https://arxiv.org/abs/1804.04235, algorithm 4 with the learning rate of the schedule in place of
the paper's relative step. That is ``transformers.optimization.Adafactor`` with ``relative_step``
and ``scale_parameter`` off and without ``beta1``. ``torch.optim.Adafactor`` (2.13) always scales
the rate by the parameter's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmtune.optimizer.optimizer import OPTIMIZERS, Optimizer, Shape
from llmtune.optimizer.update import Update

if TYPE_CHECKING:
    import torch

#: The paper's constants: epsilon 1 of squared gradients, the limit of an update's root mean square,
#: and the exponent with which the second moment's decay approaches 1.
_EPSILON = 1e-30
_CLIP_THRESHOLD = 1.0
_DECAY_RATE = -0.8


def _shapes(shape: Shape) -> Mapping[str, Shape]:
    """Return the states of a parameter: a stack of matrices has means of each matrix."""
    if len(shape) < 2:
        return {"exp_avg_sq": shape}
    return {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": (*shape[:-2], shape[-1])}


def _update(update: Update) -> None:
    """Make one step of whole parameters; the host does not wait for the device."""
    rate, decay = update.settings["lr"], update.settings["weight_decay"]
    # The weight of the newest square; 1 in the first step.
    newest = update.step**_DECAY_RATE
    for index, parameter in enumerate(update.parameters):
        states = {name: tensors[index] for name, tensors in update.states.items()}
        direction = _direct(update.gradients[index], states, newest)
        size = direction.norm() / direction.numel() ** 0.5
        direction.mul_(rate / (size / _CLIP_THRESHOLD).clamp(min=1))
        parameter.mul_(1 - rate * decay).sub_(direction)


def _direct(
    gradient: torch.Tensor, states: Mapping[str, torch.Tensor], newest: float
) -> torch.Tensor:
    """Update the second moment, and divide the gradient by its root."""
    import torch

    squares = gradient.square().add_(_EPSILON)
    if "exp_avg_sq" in states:
        moment = states["exp_avg_sq"].lerp_(squares, newest)
        return torch.rsqrt(moment, out=squares).mul_(gradient)
    rows = states["exp_avg_sq_row"].lerp_(squares.mean(dim=-1), newest)
    columns = states["exp_avg_sq_col"].lerp_(squares.mean(dim=-2), newest)
    of_rows = (rows / rows.mean(dim=-1, keepdim=True)).rsqrt_()
    of_columns = columns.rsqrt()
    return torch.mul(of_rows.unsqueeze(-1), of_columns.unsqueeze(-2), out=squares).mul_(gradient)


OPTIMIZERS.register(
    Optimizer(
        name="adafactor",
        title="Adafactor",
        states=("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"),
        state_shapes=_shapes,
        stages=(0,),
        stages_reason=(
            "ZeRO cuts matrices into flat pieces, which have no rows and columns to take means of;"
            " take zero=0, or optim=adamw_8bit, which is cut anywhere"
        ),
        reads=("weight_decay",),
        update=_update,
        # Squares, two means, the product, its norm, three kernels that change it or the weight,
        # and the weight's copy in 16 bits.
        kernel_bytes=16 + 8 + 4 + 12 + 4 + 8 + 8 + 12 + 2,
    )
)
