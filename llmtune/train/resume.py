"""Where a run goes on from: the newest checkpoint that is whole, here or at the mirror."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmtune.checkpoint import names
from llmtune.checkpoint.find import find_checkpoints, restore_replaced
from llmtune.checkpoint.manifest import check_undamaged, find_damage
from llmtune.checkpoint.mirror import fetch_remote, find_remote
from llmtune.checkpoint.trainer_state import check_draws
from llmtune.config.schema import Config
from llmtune.errors import CheckpointError
from llmtune.secrets import redact
from llmtune.train.run_folder import RunFolder, check_same_run


def resume_point(folder: RunFolder, config: Config, run_name: str, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to go on from, every byte of it checked; None for a run from the beginning.

    Raises:
        CheckpointError: The one that is named is incomplete, damaged, or of a run with another configuration; or all are
            damaged.
    """
    wanted = config.resume_from_checkpoint
    if wanted == "none":
        return None
    restore_replaced(folder.path)
    if wanted != "auto":
        found = _named(folder, wanted, say)
        check_same_run(found, config)
        check_draws(found)
        return found
    newest = _newest_whole(folder.path, say)
    newest = _newer_at_mirror(folder, config, run_name, newest, say) or newest
    if newest is not None:
        check_same_run(newest, config)
        check_draws(newest)
    if newest is None and find_checkpoints(folder.path):
        raise CheckpointError(
            f"{folder.path}: every checkpoint in it is damaged (named above), and none was overwritten. Take another "
            "run_name= or output_dir= to start anew, or remove them to start anew here"
        )
    return newest


def _newer_at_mirror(
    folder: RunFolder, config: Config, run_name: str, newest: Path | None, say: Callable[[str], None]
) -> Path | None:
    """A copy of a later step than what is here, fetched. A mirror that is out of reach matters only where there is nothing."""
    if config.checkpoint.mirror is None:
        return None
    try:
        remote = find_remote(config.checkpoint.mirror, run_name)
    except CheckpointError as error:
        if newest is None:
            raise
        say(f"warning: {error}; going on from {newest.name}, which is here")
        return None
    here = names.checkpoint_step(newest) or 0 if newest else -1
    if not remote or remote[-1][0] <= here:
        return None
    return _fetch(folder, remote[-1][1], say)


def _named(folder: RunFolder, wanted: str, say: Callable[[str], None]) -> Path:
    if "://" in wanted:
        return _fetch(folder, wanted, say)
    found = Path(wanted).expanduser()
    check_undamaged(found)
    return found


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
