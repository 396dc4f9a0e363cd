"""Whose a run's place at ``checkpoint.mirror`` is: told before anything is trained, by an id that
the run keeps.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

from llmtune.checkpoint.mirror import owner_file, read_place, withdraw_copies
from llmtune.config.schema import Config
from llmtune.errors import CheckpointError, ConfigError
from llmtune.security.redaction import redact
from llmtune.train.run_folder import RunFolder


def settle_run_id(
    folder: RunFolder,
    config: Config,
    run_name: str,
    resume_from: Path | None,
    say: Callable[[str], None],
) -> str:
    """The id of this run: that of its folder; of its place at the mirror where it goes on from
    there; or a new one.

    Args:
        resume_from: What it goes on from.

    Raises:
        ConfigError: The driver of the mirror is not installed, or the mirror is the run folder
            itself.
        CheckpointError: The place holds copies that this run did not write, and is not going on
            from.
    """
    stored, mirror = folder.read_record().run_id, config.checkpoint.mirror
    if mirror is None:
        return stored or uuid.uuid4().hex
    own_place = Path(mirror.removeprefix("file://")).expanduser() / run_name
    if own_place.resolve() == folder.path.resolve():
        raise ConfigError(
            f"checkpoint.mirror={mirror}: copies of run_name={run_name} would lie in {own_place},"
            " which is the run folder itself; name a place elsewhere"
        )
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
    marked = owner is not None and owner == stored
    # What begins at the beginning would leave them as where the run stands.
    anew = config.resume_from_checkpoint == "none" and copies
    if (unmarked or marked) and not anew:
        return stored or uuid.uuid4().hex
    held = ", ".join(copies[-3:]) or f"none that is left; {owner_file(run_name)} says whose it is"
    raise CheckpointError(
        f"checkpoint.mirror={redact(mirror)} has a place for run_name={run_name} that another run"
        f" has filled (checkpoints: {held}), and this one begins anew"
        f" (resume_from_checkpoint={redact(config.resume_from_checkpoint)}); nothing there was"
        " changed. Take another run_name= or checkpoint.mirror=, or remove it"
    )


def withdraw_left_copies(
    config: Config, run_name: str, run_id: str, step: int, say: Callable[[str], None]
) -> None:
    """Where the run is taken back by ``resume_from_checkpoint``: its copies of ``step`` and later
    are no more where it stands.

    Without this, the start after the next stop would fetch what was left behind.
    """
    mirror = config.checkpoint.mirror
    if mirror is None or config.resume_from_checkpoint in ("auto", "none"):
        return
    try:
        withdrawn = withdraw_copies(mirror, run_name, run_id, step)
    except CheckpointError as error:
        say(f"warning: {error}; later copies of this run there still count")
        return
    if withdrawn:
        say(
            f"{', '.join(withdrawn)} at checkpoint.mirror={redact(mirror)}: left behind, and not"
            " gone on from any more"
        )
