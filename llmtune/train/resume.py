"""Where a run goes on from: the newest checkpoint that is whole, here or at the mirror."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmtune.checkpoint.find import find_checkpoints, restore_checkpoints
from llmtune.checkpoint.mirror import fetch_remote, find_remote, read_place, read_remote
from llmtune.checkpoint.trainer_state import check_draws, read_trainer_state
from llmtune.config.schema import Config
from llmtune.errors import CheckpointError
from llmtune.plan.run_record import BeganFrom
from llmtune.security.redaction import redact
from llmtune.storage import layout
from llmtune.storage.manifest import check_undamaged, find_damage
from llmtune.train.run_folder import (
    ForeignRunError,
    RunFolder,
    compare_stored_config,
    find_config_changes,
)


def resume_point(
    folder: RunFolder, config: Config, run_name: str, say: Callable[[str], None]
) -> Path | None:
    """The checkpoint to go on from, every byte of it checked; None for a run from the beginning.

    A checkpoint that ``resume_from_checkpoint`` names begins a run, once: the same command goes on
    from what the run has saved since, so that a job which is stopped and queued again comes to its
    end.

    Raises:
        CheckpointError: The one that is named is incomplete, damaged, or of a run with another
            configuration; or all are damaged.
    """
    wanted = config.resume_from_checkpoint
    if wanted == "none":
        return None
    restore_checkpoints(folder.path)
    if wanted != "auto":
        found = _own_since(folder, config, run_name, wanted, say) or _named(
            folder, config, run_name, wanted, say
        )
        find_config_changes(found, config)
        check_draws(found)
        return found
    newest = _newest_whole(folder.path, say)
    newest = _newer_at_mirror(folder, config, run_name, _step(newest), say) or newest
    if newest is None and not find_checkpoints(folder.path):
        newest = _where_it_began(folder, say)
    if newest is not None:
        find_config_changes(newest, config)
        check_draws(newest)
    if newest is None and find_checkpoints(folder.path):
        raise CheckpointError(
            f"{folder.path}: every checkpoint in it is damaged (named above), and none was"
            " overwritten. Take another run_name= or output_dir= to start anew, or remove them to"
            " start anew here"
        )
    return newest


def named_origin(wanted: str) -> str:
    """A checkpoint that ``resume_from_checkpoint`` names, in the one form in which the run folder
    remembers it.
    """
    return (
        redact(wanted.rstrip("/")) if "://" in wanted else str(Path(wanted).expanduser().resolve())
    )


def began_from(folder: RunFolder, config: Config) -> BeganFrom | None:
    """The checkpoint that the run was told to begin from, for the run folder to remember."""
    wanted, began = config.resume_from_checkpoint, folder.read_record().began_from
    if wanted in ("auto", "none"):
        return began
    origin = named_origin(wanted)
    if began is not None and began.origin == origin:
        return began
    return BeganFrom(origin, _named_step(wanted, origin))


def _own_since(
    folder: RunFolder, config: Config, run_name: str, wanted: str, say: Callable[[str], None]
) -> Path | None:
    """The newest whole checkpoint that the run has saved since it began from ``wanted``; None where
    it begins now.

    A checkpoint of the run's own folder, or of its place at the mirror, is gone back to the first
    time that it is named.
    """
    origin, began = named_origin(wanted), folder.read_record().began_from
    if began is not None and began.origin == origin:
        # What it began from may be gone by now.
        least = began.step
    elif _is_within(origin, str(folder.path)) or _is_own_copy(origin, config, run_name):
        return None
    else:
        least = _named_step(wanted, origin) + 1
    newest = _newest_whole(folder.path, say)
    here = max(_step(newest), least - 1)
    newest = _newer_at_mirror(folder, config, run_name, here, say) or newest
    if newest is None or _step(newest) < least:
        return None
    if str(newest.resolve()) != origin:
        say(
            f"resume_from_checkpoint={redact(wanted)} is where a run begins, and this one has come"
            f" to {newest.name}: going on from there (another run_name= or output_dir= begins anew)"
        )
    return newest


def _where_it_began(folder: RunFolder, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that this run was told to begin from by an earlier command, where it has saved
    nothing since.
    """
    began = folder.read_record().began_from
    if began is None:
        return None
    origin = Path(began.origin)
    if find_damage(origin):
        say(
            f"warning: this run began from {origin}, which is gone or damaged, and has saved"
            " nothing: beginning anew"
        )
        return None
    say(f"this run began from {origin}, and has saved nothing since")
    return origin


def _is_own_copy(origin: str, config: Config, run_name: str) -> bool:
    mirror = config.checkpoint.mirror
    return mirror is not None and _is_within(origin, f"{mirror.rstrip('/')}/{run_name}")


def _is_within(origin: str, place: str) -> bool:
    return origin.rpartition("/")[0] == named_origin(place)


def _newer_at_mirror(
    folder: RunFolder, config: Config, run_name: str, here: int, say: Callable[[str], None]
) -> Path | None:
    """The newest whole copy of a later step than ``here``, fetched. Where nothing is here (-1), one
    must be read.

    Raises:
        CheckpointError: It is of another run; or the mirror is out of reach, or every copy there
            damaged, and nothing is here.
    """
    if config.checkpoint.mirror is None:
        return None
    own_id = folder.read_record().run_id
    try:
        if own_id is not None and read_place(config.checkpoint.mirror, run_name)[0] not in (
            None,
            own_id,
        ):
            # Another run's, which is refused before training begins.
            return None
        remote = find_remote(config.checkpoint.mirror, run_name)
    except CheckpointError as error:
        if here < 0:
            raise
        say(f"warning: {error}; going on from checkpoint-{here}, which is here")
        return None
    failure: CheckpointError | None = None
    for url in (url for step, url in reversed(remote) if step > here):
        try:
            stored = read_remote(url, layout.CONFIG)
            if stored is not None:
                # Another run's would be fetched for nothing, and stand in the way of this one.
                compare_stored_config(stored, redact(url), config, "checkpoint.mirror=")
            return _fetch(folder, url, say)
        except ForeignRunError:
            raise
        except CheckpointError as error:
            failure = error
            say(f"passed over: {error}")
    if failure is not None and here < 0:
        raise failure
    return None


def _named(
    folder: RunFolder, config: Config, run_name: str, wanted: str, say: Callable[[str], None]
) -> Path:
    if "://" in wanted or _is_own_copy(named_origin(wanted), config, run_name):
        return _fetch(folder, wanted, say)
    found = Path(wanted).expanduser()
    check_undamaged(found)
    return found


def _named_step(wanted: str, origin: str) -> int:
    """-1 for a URL that does not tell, which is refused when it is fetched."""
    if "://" in wanted:
        step = layout.checkpoint_step(Path(origin))
        return -1 if step is None else step
    try:
        return read_trainer_state(Path(origin)).step
    except CheckpointError:
        if inside := find_checkpoints(Path(origin)):
            raise CheckpointError(
                f"resume_from_checkpoint={wanted} is a run folder: name one of its checkpoints, of"
                f" which {inside[-1]} is the newest"
            ) from None
        # With all that is wrong.
        check_undamaged(Path(origin))
        raise


def _step(checkpoint: Path | None) -> int:
    """-1 for none."""
    return layout.checkpoint_step(checkpoint) or 0 if checkpoint else -1


def _newest_whole(run: Path, say: Callable[[str], None]) -> Path | None:
    for found in reversed(find_checkpoints(run)):
        problems = find_damage(found)
        if not problems:
            return found
        say(f"{found.name} is damaged and passed over: {'; '.join(problems)}")
    return None


def _fetch(folder: RunFolder, url: str, say: Callable[[str], None]) -> Path:
    say(f"fetching {redact(url)}")
    fetched = fetch_remote(url, folder.path)
    folder.restore(fetched)
    return fetched
