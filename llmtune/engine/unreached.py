"""Find trained parameters that no gradient has reached."""

from __future__ import annotations

import re

from llmtune.engine.distributed import all_reduce_any
from llmtune.engine.optimizer_state import (
    iterate_in_memory,
    state_kinds,
    state_slices,
    view_state,
)
from llmtune.engine.train_module import TrainModule
from llmtune.optimizer.storage import SCALES

_EXPERT = re.compile(r"\.experts\.\d+\.")


def find_unreached(module: TrainModule) -> list[str]:
    """Name the trained parameters whose gradient was exactly zero in every step so far. Collective.

    The optimizer's first state tells it in every stage and placement: it is a sum of all gradients,
    each with a factor above zero. Experts that no token was sent to are left out, as long as others
    of their kind got some.
    """
    if not module.optimizer.states:
        return []
    moved: dict[str, bool] = {
        name: False
        for name, parameter in module.model.named_parameters()
        if parameter.requires_grad
    }
    for batch in iterate_in_memory(module, state_slices(module)):
        for part in batch:
            if not moved[part.name]:
                first = state_kinds(module, part)[1]
                # A code of 8 bits is not zero where its number is: the scale of its block is.
                told_by = first + SCALES if module.optimizer.storage(first).in_blocks else first
                moved[part.name] = bool(view_state(module, part, told_by).any())
    found = all_reduce_any(list(moved.values()), module.rank)
    reached = dict(zip(moved, found, strict=True))
    used = {_EXPERT.sub(".experts.", name) for name, is_moved in reached.items() if is_moved}
    return [
        name
        for name, is_moved in reached.items()
        if not is_moved and _EXPERT.sub(".experts.", name) not in used
    ]
