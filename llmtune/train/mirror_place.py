"""Whose a run's place at ``checkpoint.mirror`` is: told before anything is trained, by an id that the run keeps."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

from llmtune.checkpoint.mirror import read_place
from llmtune.config.schema import Config
from llmtune.errors import CheckpointError
from llmtune.secrets import redact
from llmtune.train.run_folder import RunFolder


def settle_run_id(
    folder: RunFolder, config: Config, run_name: str, resume_from: Path | None, say: Callable[[str], None]
) -> str:
    """The id of this run: that of its folder; of its place at the mirror where it goes on from there; or a new one.

    Args:
        resume_from: What it goes on from.

    Raises:
        ConfigError: The driver of the mirror is not installed.
        CheckpointError: The place holds copies that this run did not write, and is not going on from.
    """
    stored, mirror = folder.read_run_id(), config.checkpoint.mirror
    if mirror is None:
        return stored or uuid.uuid4().hex
    try:
        owner, copies = read_place(mirror, run_name)
    except CheckpointError as error:
        # Looked at again before the first copy.
        say(f"warning: {error}")
        return stored or uuid.uuid4().hex
    # With auto and nothing to go on from, no copy there is whole.
    own = resume_from is not None and resume_from.resolve().parent == folder.path.resolve()
    goes_on = own or (resume_from is None and config.resume_from_checkpoint == "auto")
    if stored is None and goes_on:
        return owner or uuid.uuid4().hex
    unmarked = owner is None and (goes_on or not copies)
    if unmarked or (owner is not None and owner == stored):
        return stored or uuid.uuid4().hex
    held = ", ".join(copies[-3:]) or "none that is left"
    raise CheckpointError(
        f"checkpoint.mirror={redact(mirror)} has a place for run_name={run_name} that another run has filled (checkpoints: "
        f"{held}), and this one begins anew (resume_from_checkpoint={redact(config.resume_from_checkpoint)}); nothing there "
        "was changed. Take another run_name= or checkpoint.mirror=, or remove it"
    )
