"""``tests.engine.worker``, and what ranks say to each other in the last step of every task."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from llmtune.engine.distributed import barrier
from llmtune.engine.train_module import TrainModule
from tests.engine.worker import ask_cpu_once, run_task
from tests.joined import join_ranks

#: Function of torch -> the argument whose elements are counted.
COLLECTIVES = {
    "all_reduce": 0,
    "reduce": 0,
    "reduce_scatter_tensor": 1,
    "reduce_scatter": 1,
    "all_gather_into_tensor": 0,
    "all_gather": 0,
    "all_to_all_single": 0,
    "broadcast": 0,
}

#: Of the step that is under way: function, and elements.
calls: list[tuple[str, int]] = []
#: Of every step of the task: a digest of the gradients that the optimizer gets.
digests: list[str] = []


def count_calls() -> None:
    """Have torch's collectives write down that they were called."""

    def count(name: str, at: int, collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def counted(*given: Any, **named: Any) -> Any:
            value = given[at] if len(given) > at else next(iter(named.values()))
            several = value if isinstance(value, list | tuple) else [value]
            calls.append((name, sum(one.numel() for one in several)))
            return collective(*given, **named)

        return counted

    for name, at in COLLECTIVES.items():
        setattr(dist, name, count(name, at, getattr(dist, name)))


def digest_gradients() -> None:
    """Have ZeRO 1 and 2 write down the gradients of a rank's partition before each step."""
    step = DeepSpeedZeroOptimizer.step

    def digested(self: Any, *given: Any, **named: Any) -> Any:
        digest = hashlib.sha256()
        for tensors in self.averaged_gradients.values():
            for tensor in tensors or ():
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        digests.append(digest.hexdigest())
        return step(self, *given, **named)

    DeepSpeedZeroOptimizer.step = digested


def count_steps() -> None:
    """Have every step begin with no calls."""
    train_step = TrainModule.train_step

    def counted(self: TrainModule, *given: Any, **named: Any) -> Any:
        calls.clear()
        return train_step(self, *given, **named)

    TrainModule.train_step = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    # DeepSpeed takes some of torch's functions when ranks join.
    count_calls()
    this = join_ranks()
    ask_cpu_once()
    count_steps()
    digest_gradients()
    results = []
    for task in json.loads(sys.argv[1]):
        digests.clear()
        result = run_task(task, this)
        results.append({**result, "calls": list(calls), "digests": list(digests)})
    if this.is_first:
        Path(sys.argv[2]).write_text(json.dumps(results))
    barrier(this)
    os._exit(0)
