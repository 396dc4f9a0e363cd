"""Measure how long layers wait for the weights that ZeRO 3 gathers for them."""

from __future__ import annotations

from typing import Any

from llmtune.engine.phases.phase_clock import PhaseClock

#: The part of forward and backward passes in which the stream waits for weights.
GATHER = "gather"
#: The phases in which it counts: an evaluation gathers too, and is one phase.
STEP_PHASES = ("forward", "backward")


def time_gathers(engine_optimizer: Any, clock: PhaseClock) -> None:
    """Measure every wait for weights of a ZeRO 3 engine.

    DeepSpeed 0.19.8 gathers in a stream of its own, which the stream of the layers waits for within
    ``PartitionedParameterCoordinator.fetch_sub_module``. So this is the part of the communication
    that computation does not hide. On a CPU it is all of it.

    Args:
        engine_optimizer: DeepSpeed's ZeRO 3 optimizer.
    """
    coordinator = engine_optimizer.parameter_offload.get_param_coordinator()
    fetch = coordinator.fetch_sub_module

    def timed(*args: Any, **kwargs: Any) -> None:
        with clock.part(GATHER, STEP_PHASES):
            fetch(*args, **kwargs)

    coordinator.fetch_sub_module = timed
