"""``tests.engine.worker`` on pretend GPUs: the same tasks, and what each step made the host wait
for.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from tests.cuda import pretend
from tests.support import ROOT

device = pretend.register()

from llmtune.engine.distributed import barrier  # noqa: E402
from llmtune.engine.train_module import TrainModule  # noqa: E402
from llmtune.launch.supervise.out_of_memory import memory_pool  # noqa: E402
from tests.engine.worker import ask_cpu_once, run_task  # noqa: E402
from tests.joined import join_ranks  # noqa: E402

#: Of this step.
places: Counter[str] = Counter()


def _place() -> str:
    """The innermost line that is not torch's own."""
    frames = traceback.extract_stack()
    known = ("llmtune/", "deepspeed/", "transformers/", "peft/")
    for frame in reversed(frames):
        name = frame.filename.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")
        if name.startswith(known):
            return f"{name}:{frame.lineno} {frame.name}"
    return "a thread of torch"


def count_waits(seen: list[dict[str, Any]]) -> None:
    """Have every step add what it made the host wait for, and from where in llmtune, transformers,
    peft or DeepSpeed.
    """
    train_step = TrainModule.train_step
    device.on_wait(lambda kind: places.update([f"{kind} at {_place()}"]))

    def counted(self: TrainModule, *given: Any, **named: Any) -> Any:
        device.reset_counts()
        places.clear()
        result = train_step(self, *given, **named)
        seen.append({**device.counts(), "places": dict(places)})
        return result

    TrainModule.train_step = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    pretend.show_gpus()
    if limit := os.environ.get("PRETEND_LIMIT"):
        device.limit(0, int(limit))
    rank = join_ranks("cuda")
    ask_cpu_once()
    waits: list[dict[str, int]] = []
    count_waits(waits)
    results = []
    for task in json.loads(sys.argv[1]):
        waits.clear()
        device.reset_peak(rank.local_rank)
        try:
            result = run_task(task, rank)
        except Exception as error:
            if not task.get("may_fail"):
                raise
            result = {"error": traceback.format_exc(), "pool": memory_pool(error)}
        results.append({**result, "waits": list(waits), "peak": device.memory(rank.local_rank)[1]})
    if rank.is_first:
        Path(sys.argv[2]).write_text(json.dumps(results))
    barrier(rank)
    os._exit(0)
