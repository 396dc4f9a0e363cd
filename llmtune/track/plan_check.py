"""Compare the first steps of a run with its plan, and remember what the machine reached."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.config.schema import Precision
from llmtune.plan.devices.measured import FEWEST_STEPS, Reached, remember
from llmtune.plan.speed import reachable_flops
from llmtune.track.phase_seconds import compare_memory, compare_speed
from llmtune.track.tracker import Outcome, Record
from llmtune.units import format_bytes

if TYPE_CHECKING:
    from llmtune.plan.plan import Plan


class PlanCheck:
    """A tracker that says after some steps how speed and memory compare with the plan."""

    def __init__(
        self, plan: Plan, precision: Precision, cache_dir: Path, say: Callable[[str], None]
    ):
        """Args:
        cache_dir: Where the speed is remembered for ``hardware=measured``.
        say: Shows a line to the user.
        """
        self._plan = plan
        self._precision = precision
        self._cache_dir = cache_dir
        self._say = say
        self._steps: list[Record] = []

    def log(self, record: Record) -> None:
        """Look at the record of a step."""
        if record.get("tokens_per_second") is None or record.get("skipped"):
            return
        self._steps.append(record)
        if len(self._steps) == FEWEST_STEPS:
            self._say(f"after {FEWEST_STEPS} steps: {self._compare()}")

    def finish(self, outcome: Outcome) -> None:  # noqa: ARG002 - as all trackers
        """Remember the speed, where it says something about the accelerator."""
        placement = self._plan.placement
        offloads = placement.optimizer != "none" or placement.param != "none"
        if len(self._steps) < FEWEST_STEPS or offloads:
            return
        speed = compare_speed(self._plan, self._steps)
        if speed is None or not (speed.planned and speed.measured):
            return
        reached = Reached(
            flops=reachable_flops(self._plan.hardware, self._precision) * speed.ratio,
            parameters=self._plan.shape.parameters,
            steps=len(self._steps),
            time=time.time(),
        )
        remember(self._plan.hardware, self._precision, reached, self._cache_dir)

    def _compare(self) -> str:
        parts = []
        if (speed := compare_speed(self._plan, self._steps)) is not None:
            parts.append(
                f"{speed.measured:,.0f} tokens/s, planned {speed.planned:,.0f} for full rows"
                f" ({speed.ratio:.2f} of it)"
            )
            seconds = statistics.median(step["seconds"] for step in self._steps[1:])
            parts.append(f"{seconds:.3g} s a step")
        if (memory := compare_memory(self._plan, self._steps)) is not None:
            parts.append(
                f"memory {format_bytes(memory.measured)}, planned {format_bytes(memory.planned)}"
                f" ({memory.ratio:.2f} of it)"
            )
        return "; ".join(parts)
