"""The state of a run in its checkpoints, beside weights and optimizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmtune.draws import DRAWS_VERSION
from llmtune.errors import CheckpointError
from llmtune.storage import layout
from llmtune.storage.manifest import read_manifest
from llmtune.storage.plain_json import parse_json


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """The state of a run; with the seed it also determines the coming rows and the dropout."""

    step: int
    """Optimizer steps done, skipped ones included."""
    tokens: int
    """Tokens seen, padding excluded."""
    skipped: int
    """Steps that changed nothing, because a number was not finite.

    The schedule does not count them.
    """
    data_fingerprint: str
    """Fingerprint of the tokenized rows."""
    data_position: Mapping[str, Any] | None
    """Position in the data, as the loader describes it."""
    evaluation_due: bool = False
    """The evaluation of this step was interrupted, and comes first after a resume."""
    best: dict[str, Any] | None = None
    """``metric``, ``value`` and ``step`` of the best evaluation so far."""
    best_goal: str | None = None
    """Rule by which ``best`` was chosen, such as ``min eval_loss``; None where none is."""
    stale_evaluations: int | None = None
    """Evaluations in a row that did not improve it; None before the first evaluation."""
    tracker_run_id: str | None = None
    """The id at the experiment tracker, where a resumed run continues."""
    optimizer_steps: int = 0
    """Steps that the optimizer counted."""
    loss_scale: dict[str, float] = field(default_factory=dict)
    """fp16 only."""
    draws_version: int = 1
    """Version of the random draws; checkpoints without it are of the first."""
    line: dict[str, Any] | None = None
    """Sums since the last line of ``metrics.jsonl``, where one was begun."""

    def to_json(self) -> str:
        """Return the text of ``trainer_state.json``."""
        return json.dumps(asdict(self), indent=1)


def read_trainer_state(folder: Path) -> TrainerState:
    """Read the state from a complete checkpoint.

    Raises:
        CheckpointError: The folder is incomplete or damaged.
    """
    read_manifest(folder)
    try:
        return TrainerState(**parse_json((folder / layout.TRAINER_STATE).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: {layout.TRAINER_STATE} cannot be read ({error})"
        ) from error


def check_draws(folder: Path) -> None:
    """Refuse to resume where coming rows and dropout would be drawn in another way than before.

    Raises:
        CheckpointError: The folder is incomplete or damaged, or was written with other draws.
    """
    version = read_trainer_state(folder).draws_version
    if version != DRAWS_VERSION:
        raise CheckpointError(
            f"{folder} was written with version {version} of the random draws, and this llmtune has"
            f" version {DRAWS_VERSION}: the order of the rows would change in the middle of the"
            " run. Resume with the llmtune that began it (environment.json names it), or start anew"
            " with another run_name= or output_dir="
        )
