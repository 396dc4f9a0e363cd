"""The owner of a run's folder at ``checkpoint.mirror``, checked before training by the run's id."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

from llmtune.checkpoint.mirror import owner_file, read_place, withdraw_copies
from llmtune.config.schema import Config
from llmtune.errors import CheckpointError, ConfigError
from llmtune.security.redaction import redact
from llmtune.train.run_folder import RunFolder


def resolve_run_id(
    folder: RunFolder,
    config: Config,
    run_name: str,
    resume_from: Path | None,
    say: Callable[[str], None],
) -> str:
    """Return the id of this run, and check that the mirror's folder may be used.

    The id is that of the run folder; that of its folder at the mirror if the run resumes from
    there; or a new one.

    Args:
        resume_from: The checkpoint that the run resumes from.

    Raises:
        ConfigError: The driver of the mirror is not installed, or the mirror is the run folder
            itself.
        CheckpointError: The mirror's folder holds copies that this run neither wrote nor resumes
            from.
    """
    stored = folder.read_record().run_id
    mirror = config.checkpoint.mirror
    if mirror is None:
        return stored or uuid.uuid4().hex
    own_folder = Path(mirror.removeprefix("file://")).expanduser() / run_name
    if own_folder.resolve() == folder.path.resolve():
        raise ConfigError(
            f"checkpoint.mirror={mirror}: copies of run_name={run_name} would be in {own_folder},"
            " which is the run folder itself; name another folder or URL"
        )
    try:
        owner, copies = read_place(mirror, run_name)
    except CheckpointError as error:
        # The owner is checked again before the first copy.
        say(f"warning: {error}")
        return stored or uuid.uuid4().hex

    # A run without an id that resumes takes the mirror's. With auto and nothing to resume from, no
    # copy there is complete.
    is_own = resume_from is not None and resume_from.resolve().parent == folder.path.resolve()
    resumes = is_own or (resume_from is None and config.resume_from_checkpoint == "auto")
    if stored is None and resumes:
        return owner or uuid.uuid4().hex

    # The folder is free, or this run's. A run that begins anew would leave old copies behind, from
    # which its next start would resume.
    is_free = owner is None and (resumes or not copies)
    is_marked = owner is not None and owner == stored
    leaves_copies = config.resume_from_checkpoint == "none" and copies
    if (is_free or is_marked) and not leaves_copies:
        return stored or uuid.uuid4().hex
    held = ", ".join(copies[-3:]) or f"none are left; {owner_file(run_name)} names the owner"
    raise CheckpointError(
        f"checkpoint.mirror={redact(mirror)} has a folder for run_name={run_name} that another run"
        f" has filled (checkpoints: {held}), and this one begins anew"
        f" (resume_from_checkpoint={redact(config.resume_from_checkpoint)}); nothing there was"
        " changed. Take another run_name= or checkpoint.mirror=, or remove that folder"
    )


def withdraw_left_copies(
    config: Config, run_name: str, run_id: str, step: int, say: Callable[[str], None]
) -> None:
    """Withdraw the copies of ``step`` and later where ``resume_from_checkpoint`` goes back.

    Without this, the start after the next stop would fetch the copies that were left behind.
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
            f"{', '.join(withdrawn)} at checkpoint.mirror={redact(mirror)}: withdrawn, no run"
            " resumes from them any more"
        )
