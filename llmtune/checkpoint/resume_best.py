"""Resume the choice of the best model at a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from llmtune.checkpoint.best import BestSoFar
from llmtune.checkpoint.retention import CheckpointInfo, find_best
from llmtune.checkpoint.trainer_state import TrainerState
from llmtune.config.best_model import BestModel


def resume_best(
    rule: BestModel | None, state: TrainerState, checkpoints: Sequence[CheckpointInfo]
) -> BestSoFar:
    """Return the state of the choice at a checkpoint.

    A checkpoint that was written under another rule does not know it. Then the best of the run's
    checkpoints up to there counts, and patience begins anew.

    Args:
        checkpoints: The complete ones of the run.
    """
    if rule is None:
        return BestSoFar()
    best = state.best
    if state.stale_evaluations is not None and state.best_goal == rule.goal:
        if best is None:
            return BestSoFar(stale=state.stale_evaluations)
        return BestSoFar(
            value=float(best["value"]), step=int(best["step"]), stale=state.stale_evaluations
        )
    earlier = [checkpoint for checkpoint in checkpoints if checkpoint.step <= state.step]
    found = find_best(earlier, rule)
    if found is None:
        return BestSoFar()
    return BestSoFar(value=found.metrics[rule.metric], step=found.step, stale=0)
