"""Name, once after the first steps, the trained tensors that no gradient reaches."""

from __future__ import annotations

from collections.abc import Callable

from llmtune.engine.train_module import TrainModule
from llmtune.engine.unreached import find_unreached
from llmtune.tuner.token_rows.settings import TOKEN_ROWS

#: Names in the warning.
_SHOWN = 4


class GradientCheck:
    """Looks at the optimizer's states after the second step, and never again.

    A LoRA matrix A has no gradient while B is zero, so that a step with a learning rate above zero
    must have come before.
    """

    def __init__(self, module: TrainModule, say: Callable[[str], None]):
        self._module = module
        self._say = say
        self._has_moved = False
        self._is_done = False

    def after_step(self, learning_rate: float, applied: bool) -> None:
        """Run after each step, on every rank with the same arguments."""
        if self._is_done or not applied:
            return
        if not self._has_moved:
            self._has_moved = learning_rate > 0
            return
        self._is_done = True
        unreached = find_unreached(self._module)
        if rows := [name for name in unreached if TOKEN_ROWS in name]:
            self._say(
                f"warning: no row of the first steps holds a token of {_list(rows)}; embeddings of"
                " tokens that do not occur learn nothing"
            )
        if names := [name for name in unreached if TOKEN_ROWS not in name]:
            self._say(
                f"warning: the gradient of {len(names)} trained tensors was exactly zero on all"
                f" ranks in every step so far, so that they learn nothing: {_list(names)}. The"
                " model does not use them for these rows; leave them out of what tuner.* trains,"
                " or report it"
            )


def _list(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
