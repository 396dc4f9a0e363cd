"""Start ranks that import their libraries while the supervisor plans and prepares.

On a GPU machine either takes a dozen seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from llmtune.config.schema import Config
from llmtune.launch.launchers.environment import (
    restored_environment,
    return_freed_memory,
    set_defaults,
)
from llmtune.launch.supervise.rank_group import RankGroup
from llmtune.plan.devices.gpus import count_gpus
from llmtune.plan.devices.probe import choose_accelerator

if TYPE_CHECKING:
    from llmtune.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Settings that ranks must be started with."""

    accelerator: str
    world_size: int
    uses_nvme: bool

    @classmethod
    def of(cls, plan: Plan) -> Surroundings:
        """Return the settings for a plan."""
        return cls(plan.hardware.accelerator, plan.world_size, plan.placement.uses_nvme)

    @classmethod
    def guess(cls, config: Config) -> Surroundings | None:
        """Guess the settings of the coming plan, without torch; None where they are open.

        None on a CPU, too: there planning rarely needs torch, and ranks would compete with it for
        the cores.
        """
        if config.offload.nvme_path is not None or config.hardware.nodes > 1:
            return None
        gpus = count_gpus()
        ranks = config.launch.nproc or config.hardware.gpus_per_node or gpus
        is_cuda = choose_accelerator(config.hardware.accelerator, gpus) == "cuda"
        return cls("cuda", ranks, False) if is_cuda and 0 < ranks <= gpus else None

    def set_variables(self) -> None:
        """Set the variables of the environment that the ranks need."""
        set_defaults(self.accelerator, self.world_size)
        if self.uses_nvme:
            return_freed_memory()


class RanksAhead:
    """The ranks of the first attempt; at the end of the block, those that still wait are ended."""

    def __init__(self, tuner: str):
        self._tuner = tuner
        self._surroundings: Surroundings | None = None
        self._group: RankGroup | None = None

    def __enter__(self) -> RanksAhead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self, surroundings: Surroundings | None) -> None:
        """Start the ranks; if they run already with other settings, start new ones instead."""
        if surroundings == self._surroundings:
            return
        self.close()
        self._surroundings = surroundings
        if surroundings is None:
            return
        with restored_environment():
            surroundings.set_variables()
            command = ["-m", "llmtune.run.rank", "--ahead", self._tuner]
            self._group = RankGroup(command, surroundings.world_size, ahead=True)

    def take(self) -> RankGroup | None:
        """Give the waiting ranks to an attempt; None where there are none.

        A second attempt starts its own, which may be on another rung with other variables.
        """
        return self._group if self._group is not None and self._group.waits else None

    def close(self) -> None:
        """End the ranks that still wait."""
        if self._group is not None and self._group.waits:
            self._group.close()
        self._group = self._surroundings = None
