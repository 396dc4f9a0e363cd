"""Ranks of the tests' own programs: they join as those of llmtune do, with their ops loaded under
its lock.
"""

from __future__ import annotations

from llmtune.engine.distributed import Rank, init_ranks
from llmtune.launch.preflight.deepspeed_ops import load_ops
from llmtune.plan.memory.placement import Placement


def join_ranks(accelerator: str = "cpu") -> Rank:
    """Without the lock, a test beside this one would take torch's lock file for one that a killed
    process left.
    """
    load_ops(accelerator, Placement(0))
    return init_ranks()
