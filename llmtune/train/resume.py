"""Find the checkpoint to resume from: the newest undamaged one, local or at the mirror."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmtune.checkpoint.find import find_checkpoints, restore_checkpoints
from llmtune.checkpoint.mirror import fetch_remote, find_remote, read_place, read_remote
from llmtune.checkpoint.trainer_state import check_draws, read_trainer_state
from llmtune.config.best_model import resolve_best_model
from llmtune.config.groups.train import TrainConfig
from llmtune.config.schema import Config
from llmtune.config.stored import load_config
from llmtune.errors import CheckpointError
from llmtune.plan.length.batch_schedule import BatchSchedule, Reached
from llmtune.plan.run_record import BeganFrom
from llmtune.security.redaction import redact
from llmtune.storage import layout
from llmtune.storage.manifest import check_undamaged, find_damage, is_complete
from llmtune.train.run_folder import (
    ForeignRunError,
    RunFolder,
    compare_stored_config,
    find_config_changes,
)


def resume_point(
    folder: RunFolder, config: Config, run_name: str, say: Callable[[str], None]
) -> Path | None:
    """Find the checkpoint to resume from, and verify every byte of it; None for a new run.

    A checkpoint that ``resume_from_checkpoint`` names begins a run only once. The same command then
    resumes from what the run has saved since, so that a job that is stopped and queued again comes
    to its end.

    Raises:
        CheckpointError: The named one is incomplete, damaged, or of a run with another
            configuration; or all are damaged.
    """
    setting = config.resume_from_checkpoint
    if setting == "none":
        return None
    restore_checkpoints(folder.path)

    # A named checkpoint begins the run once; later starts resume the run's own.
    if setting != "auto":
        checkpoint = _own_since(folder, config, run_name, setting, say)
        if checkpoint is None:
            checkpoint = _named(folder, config, run_name, setting, say)
        _check_checkpoint(checkpoint, config)
        _fetch_best(folder, config, run_name, checkpoint, say)
        return checkpoint

    # ``auto``: the newest undamaged checkpoint here or at the mirror, or the one that the run began
    # from.
    newest = _newest_whole(folder.path, say)
    newest = _newer_at_mirror(folder, config, run_name, _step(newest), say) or newest
    if newest is None and not find_checkpoints(folder.path):
        newest = _where_it_began(folder, say)
    if newest is not None:
        _check_checkpoint(newest, config)
        _fetch_best(folder, config, run_name, newest, say)
    if newest is None and find_checkpoints(folder.path):
        raise CheckpointError(
            f"{folder.path}: every checkpoint in it is damaged (named above), and none was"
            " overwritten. Take another run_name= or output_dir= to start anew, or remove them to"
            " start anew here"
        )
    return newest


def named_origin(named: str) -> str:
    """Normalize a checkpoint that ``resume_from_checkpoint`` names, as the run folder stores it."""
    if "://" in named:
        return redact(named.rstrip("/"))
    return str(Path(named).expanduser().resolve())


def began_from(folder: RunFolder, config: Config) -> BeganFrom | None:
    """Return the checkpoint that the run began from, and its step, for ``plan.json``."""
    named = config.resume_from_checkpoint
    began = folder.read_record().began_from
    if named in ("auto", "none"):
        return began
    origin = named_origin(named)
    if began is not None and began.origin == origin:
        return began
    return BeganFrom(origin, _named_step(named, origin))


def _check_checkpoint(checkpoint: Path, config: Config) -> None:
    """Check that a checkpoint is of this run, and of this version's draws.

    Raises:
        CheckpointError: It is not, or its steps followed another ``train.batch_schedule``.
    """
    find_config_changes(checkpoint, config)
    check_draws(checkpoint)
    _check_batch_schedule(checkpoint, config.train)


def _check_batch_schedule(checkpoint: Path, train: TrainConfig) -> None:
    """Check that ``train.batch_schedule`` has changed only in what is still to come."""
    old = load_config(checkpoint / layout.CONFIG).train
    if old.batch_schedule is None and train.batch_schedule is None:
        return
    # A stored configuration holds the planned rows, and that of a run has been planned.
    before, now = (BatchSchedule.from_config(of, int(of.global_batch_size)) for of in (old, train))
    state = read_trainer_state(checkpoint)
    if not before.agrees_until(now, Reached(state.step, state.tokens)):
        raise ForeignRunError(
            f"{checkpoint} was trained with other batches than train.batch_schedule gives now:\n"
            f"  {before.describe()} there, {now.describe()} now (learning rate:"
            f" {before.scaling.value} there, {now.scaling.value} now)\n"
            f"Only sizes that begin after its {state.step:,} steps and {state.tokens:,} tokens may"
            " change: take the old values, or another run_name= or output_dir="
        )


def _own_since(
    folder: RunFolder, config: Config, run_name: str, named: str, say: Callable[[str], None]
) -> Path | None:
    """Find the newest undamaged checkpoint that the run has saved since it began from ``named``.

    It is None if the run begins now. The run returns to a checkpoint of its own folder, or of its
    folder at the mirror, only the first time that it is named.
    """
    # The first step that a checkpoint saved since the beginning can have.
    origin = named_origin(named)
    began = folder.read_record().began_from
    if began is not None and began.origin == origin:
        # The checkpoint that it began from may be gone by now.
        first_step = began.step
    elif _is_within(origin, str(folder.path)) or _is_own_copy(origin, config, run_name):
        return None
    else:
        first_step = _named_step(named, origin) + 1

    # The newest checkpoint from that step on, local or at the mirror.
    newest = _newest_whole(folder.path, say)
    local_step = max(_step(newest), first_step - 1)
    newest = _newer_at_mirror(folder, config, run_name, local_step, say) or newest
    if newest is None or _step(newest) < first_step:
        return None
    if str(newest.resolve()) != origin:
        say(
            f"resume_from_checkpoint={redact(named)} is where this run began, and it has reached"
            f" {newest.name}: resuming from there (another run_name= or output_dir= begins anew)"
        )
    return newest


def _where_it_began(folder: RunFolder, say: Callable[[str], None]) -> Path | None:
    """Find the checkpoint that an earlier command began from, if nothing was saved since."""
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


def _is_within(origin: str, parent: str) -> bool:
    return origin.rpartition("/")[0] == named_origin(parent)


def _newer_at_mirror(
    folder: RunFolder, config: Config, run_name: str, local_step: int, say: Callable[[str], None]
) -> Path | None:
    """Fetch the newest undamaged copy of a later step than ``local_step``.

    Args:
        local_step: The newest local step; -1 if there is none, so that a copy must be read.

    Raises:
        CheckpointError: It is of another run; or the mirror cannot be reached, or every copy there
            is damaged, and there is no local checkpoint.
    """
    if config.checkpoint.mirror is None:
        return None

    # List the copies; a mirror that cannot be reached matters only without a local checkpoint.
    own_id = folder.read_record().run_id
    try:
        if own_id is not None and read_place(config.checkpoint.mirror, run_name)[0] not in (
            None,
            own_id,
        ):
            # The mirror's folder is another run's, which is refused before training begins.
            return None
        remote = find_remote(config.checkpoint.mirror, run_name)
    except CheckpointError as error:
        if local_step < 0:
            raise
        say(f"warning: {error}; resuming from the local checkpoint-{local_step}")
        return None

    # Fetch them from the newest on, until one is undamaged.
    failure: CheckpointError | None = None
    for url in (url for step, url in reversed(remote) if step > local_step):
        try:
            stored = read_remote(url, layout.CONFIG)
            if stored is not None:
                # Another run's copy would be fetched for nothing, and would block this run's.
                compare_stored_config(stored, redact(url), config, "checkpoint.mirror=")
            return _fetch(folder, url, say)
        except ForeignRunError:
            raise
        except CheckpointError as error:
            failure = error
            say(f"skipped: {error}")
    if failure is not None and local_step < 0:
        raise failure
    return None


def _fetch_best(
    folder: RunFolder, config: Config, run_name: str, checkpoint: Path, say: Callable[[str], None]
) -> None:
    """Fetch the best checkpoint so far too, if one is chosen and the run folder lacks it.

    Args:
        checkpoint: The one that the run resumes from.
    """
    mirror = config.checkpoint.mirror
    is_own = checkpoint.resolve().parent == folder.path.resolve()
    if mirror is None or not is_own or resolve_best_model(config) is None:
        return
    best = read_trainer_state(checkpoint).best
    step = int(best["step"]) if best is not None else 0
    if step < 1 or is_complete(layout.checkpoint_folder(folder.path, step)):
        return
    try:
        own_id = folder.read_record().run_id
        if own_id is None or read_place(mirror, run_name)[0] in (None, own_id):
            for url in (url for at, url in find_remote(mirror, run_name) if at == step):
                _fetch(folder, url, say)
    except CheckpointError as error:
        say(f"warning: the best checkpoint so far, of step {step}, was not fetched: {error}")


def _named(
    folder: RunFolder, config: Config, run_name: str, named: str, say: Callable[[str], None]
) -> Path:
    if "://" in named or _is_own_copy(named_origin(named), config, run_name):
        return _fetch(folder, named, say)
    checkpoint = Path(named).expanduser()
    check_undamaged(checkpoint)
    return checkpoint


def _named_step(named: str, origin: str) -> int:
    """Return its step; -1 for a URL that does not name one, which is refused when it is fetched."""
    if "://" in named:
        step = layout.checkpoint_step(Path(origin))
        return -1 if step is None else step
    try:
        return read_trainer_state(Path(origin)).step
    except CheckpointError:
        if inside := find_checkpoints(Path(origin)):
            raise CheckpointError(
                f"resume_from_checkpoint={named} is a run folder: name one of its checkpoints, of"
                f" which {inside[-1]} is the newest"
            ) from None
        # This raises with all that is wrong.
        check_undamaged(Path(origin))
        raise


def _step(checkpoint: Path | None) -> int:
    """Return the step of a checkpoint; -1 for none."""
    return layout.checkpoint_step(checkpoint) or 0 if checkpoint else -1


def _newest_whole(run: Path, say: Callable[[str], None]) -> Path | None:
    for checkpoint in reversed(find_checkpoints(run)):
        problems = find_damage(checkpoint)
        if not problems:
            return checkpoint
        say(f"{checkpoint.name} is damaged and skipped: {'; '.join(problems)}")
    return None


def _fetch(folder: RunFolder, url: str, say: Callable[[str], None]) -> Path:
    say(f"fetching {redact(url)}")
    fetched = fetch_remote(url, folder.path)
    folder.restore(fetched)
    return fetched
