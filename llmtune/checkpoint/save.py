"""Save: all ranks write aside, one manifest, one rename, the marker last. A folder is complete or does not exist."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtune.checkpoint import names
from llmtune.checkpoint.manifest import flush, hash_file, publish, read_manifest, write_manifest
from llmtune.checkpoint.state_files import load_state_files, write_state_file
from llmtune.engine.distributed import gather_objects
from llmtune.engine.module import TrainModule
from llmtune.engine.state import optimizer_steps, read_loss_scale, write_loss_scale
from llmtune.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class TrainerState:
    """Where the run stands; with the seed it also determines the rows to come and the dropout."""

    step: int
    """Optimizer steps done, skipped ones included."""
    tokens: int
    """Tokens seen, padding excluded."""
    optimizer_steps: int
    """Steps that AdamW counted."""
    loss_scale: dict[str, float]
    """fp16 only."""
    data_fingerprint: str
    """Of the tokenised rows."""
    data_position: Mapping[str, Any] | None
    """Where the data goes on, as the loader says it."""


def save_checkpoint(
    module: TrainModule,
    folder: Path,
    step: int,
    tokens: int,
    data_fingerprint: str,
    data_position: Mapping[str, Any] | None,
    write_model: Callable[[Path], None],
) -> None:
    """Publish ``folder``. Collective.

    Args:
        write_model: Writes weights and what belongs to them into a folder; called on all ranks.

    Raises:
        CheckpointError: On every rank, when any rank could not write; nothing is published then.
    """
    aside = folder.with_name(folder.name + ".tmp")
    _agree(module, folder, lambda: _fresh(aside) if module.rank.is_first else None)
    _agree(module, folder, lambda: write_model(aside))
    written = _agree(module, folder, lambda: hash_file(write_state_file(module, aside)))
    if module.rank.is_first:
        scale = read_loss_scale(module)
        state = TrainerState(step, tokens, optimizer_steps(module), scale, data_fingerprint, data_position)
        own = {names.state_file(rank, module.rank.world_size): entry for rank, entry in enumerate(written)}
    _agree(module, folder, lambda: _finish(module, aside, folder, state, own) if module.rank.is_first else None)


def load_checkpoint(module: TrainModule, folder: Path) -> TrainerState:
    """Optimizer state and loss scale; the weights were loaded when the model was built. Every rank reads its slices.

    Raises:
        CheckpointError: The folder is damaged, or of another model.
    """
    state = read_trainer_state(folder)
    load_state_files(module, folder, state.optimizer_steps)
    write_loss_scale(module, state.loss_scale)
    return state


def read_trainer_state(folder: Path) -> TrainerState:
    """The state of a complete checkpoint.

    Raises:
        CheckpointError: The folder is incomplete or damaged.
    """
    if not (folder / names.COMPLETE).is_file():
        raise CheckpointError(f"{folder}: not a complete checkpoint (no {names.COMPLETE} in it)")
    read_manifest(folder)
    try:
        return TrainerState(**json.loads((folder / names.TRAINER_STATE).read_text()))
    except (OSError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{folder}: {names.TRAINER_STATE} cannot be read ({error})") from error


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(
    module: TrainModule, aside: Path, folder: Path, state: TrainerState, files: dict[str, dict[str, Any]]
) -> None:
    path = aside / names.TRAINER_STATE
    path.write_text(json.dumps(asdict(state), indent=1))
    for file in sorted(aside.iterdir()):
        if file.name not in files:
            flush(file)
            files[file.name] = hash_file(file)
    about = {"step": state.step, "world_size": module.rank.world_size, "zero_stage": module.zero_stage}
    write_manifest(aside, files, about)
    old = folder.with_name(folder.name + ".old.tmp")
    if folder.exists():
        # The same step saved again.
        folder.rename(old)
    publish(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def _agree(module: TrainModule, folder: Path, act: Callable[[], Any]) -> list[Any]:
    """Do something on every rank and learn how it went on all of them; a failure of one is an error on each."""
    result: Any = None
    failure: str | None = None
    try:
        result = act()
    except OSError as error:
        failure = f"rank {module.rank.rank}: {error}"
    outcomes = gather_objects((result, failure), module.rank)
    failures = [text for _, text in outcomes if text]
    if failures:
        raise CheckpointError(
            f"{folder.name} was not saved ({'; '.join(failures)}). Nothing was published; free space or mend the path, "
            "then run the same command to go on from the newest checkpoint"
        )
    return [value for value, _ in outcomes]
