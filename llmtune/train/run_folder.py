"""The run folder: its owner, its state, and what may change between two starts of a run."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from llmtune import __version__
from llmtune.checkpoint.find import find_checkpoints, sweep_incomplete
from llmtune.checkpoint.trainer_state import read_trainer_state
from llmtune.config.best_model import BestModel
from llmtune.config.schema import Config
from llmtune.config.stored import dump_redacted, load_bytes, redact_config
from llmtune.errors import CheckpointError, ConfigError
from llmtune.plan.run_record import RunRecord
from llmtune.plan.steps import StepsPlan
from llmtune.security.redaction import redact
from llmtune.security.trust import check_links, close_run_folder
from llmtune.storage import layout
from llmtune.storage.atomic import move_folder, write_atomically
from llmtune.storage.hashing import short_hash
from llmtune.storage.rank_files import FinishedRecord
from llmtune.track.metrics import cut_metrics, read_metrics

#: Config groups that identify a run; all others may differ between two starts.
IDENTITY = ("model", "data", "tuner", "optim", "schedule", "precision", "seed")
#: Keys of those groups that change how the work is done, but no result.
NO_IDENTITY = {"data.num_workers", "data.dataloader_num_workers", "data.pin_memory"}
TRAIN_IDENTITY = (
    *("train.global_batch_size", "train.max_grad_norm"),
    *("train.neftune_noise_alpha", "train.label_smoothing"),
)
#: Keys for the place and the start of a run; their changes are not reported.
_NO_DIFFERENCE = {"run_name", "output_dir", "resume_from_checkpoint", "trace", "paths.cache_dir"}


class _Unset:
    """Marks a key that one of two dictionaries lacks, because null is a value."""

    def __repr__(self) -> str:
        return "not set"


_UNSET = _Unset()


class ForeignRunError(CheckpointError):
    """A checkpoint or a run folder belongs to a run with another configuration."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of a run."""

    path: Path

    @property
    def finished_step(self) -> int | None:
        """Return the last step of a finished run; None for others."""
        finished = FinishedRecord.read(self.path)
        return finished.step if finished else None

    def is_finished(self, total_steps: int, best: BestModel | None) -> bool:
        """Tell whether a run has nothing left to train, and published what is asked for.

        A run that was stopped early is finished for as long as the patience is not raised. One that
        published another model than ``train.load_best_model_at_end`` now asks for is not.
        """
        record = FinishedRecord.read(self.path)
        if record is None:
            return False
        patience = best.patience if best is not None else None
        is_over = patience is not None and (record.stale_evaluations or 0) >= patience
        if record.step < total_steps and not (record.stopped_early and is_over):
            return False
        if best is None or not best.load_at_end:
            return not record.loaded_best
        return record.loaded_best and record.goal == best.goal

    def find_changes(self, config: Config) -> list[str]:
        """Refuse a folder of another run, or of no run.

        Returns:
            The other differences from the last start, in words.

        Raises:
            CheckpointError: With every difference.
        """
        stored = self.path / layout.CONFIG
        if not stored.is_file():
            # Hidden files are llmtune's own marks, and what file systems and desktops put into
            # every folder.
            own = (layout.LOG, layout.SAVE_REQUEST)
            others = [
                entry.name
                for entry in self.path.iterdir()
                if entry.name[0] != "." and entry.name not in own
            ]
            # Checkpoints without a configuration beside them were fetched by a start that ended
            # before its first step; each has its own configuration.
            if others and not find_checkpoints(self.path):
                raise CheckpointError(
                    f"output_dir={self.path} is not empty and not a run folder (it holds"
                    f" {', '.join(sorted(others)[:5])}); take another output_dir= or run_name="
                )
            return []
        if not self.has_work():
            return []
        if config.resume_from_checkpoint == "none":
            raise CheckpointError(
                f"resume_from_checkpoint=none, but {self.path} holds a run already; take another"
                " output_dir= or run_name=, or remove the folder"
            )
        return find_config_changes(self.path, config)

    def find_extension(self, steps: StepsPlan, data_fingerprint: str) -> StepsPlan | None:
        """Refuse a shorter run or other data; return the old steps if there are more now.

        Raises:
            CheckpointError: With what differs.
        """
        record = self.read_record()
        if record.steps is None or record.data is None or not self.has_work():
            return None
        if record.data.fingerprint not in ("", data_fingerprint):
            raise CheckpointError(
                f"the rows of data.train are not those that {self.path} was started with (a file,"
                " a data format's module, the tokenizer or the Python version changed); take"
                " another run_name= or output_dir="
            )
        before = record.steps.total_steps
        if steps.total_steps < before:
            raise CheckpointError(
                f"{self.path} was started for {before} steps and would now have"
                f" {steps.total_steps}, which is another schedule; take train.max_steps of at least"
                " as many, or another run_name= or output_dir="
            )
        return record.steps if steps.total_steps > before else None

    def begin(
        self,
        config: Config,
        overrides: list[str],
        record: RunRecord,
        step: int,
        resume_from: Path | None,
    ) -> list[str]:
        """Write the files that describe the run, and set aside checkpoints that are left behind.

        Args:
            step: Step of ``resume_from``; -1 for a new run, none of whose old lines count.
            resume_from: The checkpoint that the run resumes from, which may be another run's.

        Returns:
            Sentences on what was removed or renamed.

        Raises:
            CheckpointError: The disk refused a file; the files of the last start remain.
        """
        try:
            return self._begin(config, overrides, record, step, resume_from)
        except OSError as error:
            raise CheckpointError(
                f"output_dir={self.path} cannot be written: {error.strerror or error}. Free space"
                " there, or take another output_dir=; the same command then resumes"
            ) from error

    def _begin(
        self,
        config: Config,
        overrides: list[str],
        record: RunRecord,
        step: int,
        resume_from: Path | None,
    ) -> list[str]:
        # Remove what is left of interrupted saves, and set aside checkpoints of steps to come.
        notes = [
            f"removed what an interrupted save left behind: {name}"
            for name in sweep_incomplete(self.path)
        ]
        for folder in find_checkpoints(self.path):
            if resume_from is not None and (layout.checkpoint_step(folder) or 0) >= self.first_left(
                step, resume_from
            ):
                aside = folder.with_name(f"superseded-{folder.name}")
                move_folder(folder, aside)
                notes.append(
                    f"{folder.name} does not follow from {resume_from} and was renamed to"
                    f" {aside.name}"
                )

        # Forget the end of an earlier start.
        (self.path / layout.FINISHED).unlink(missing_ok=True)
        (self.path / layout.ENDED).unlink(missing_ok=True)
        # A request that was meant for an earlier start.
        (self.path / layout.SAVE_REQUEST).unlink(missing_ok=True)

        # Cut the lines of steps to come, and describe this start.
        cut_metrics(self.path / layout.METRICS, step)
        write_atomically(self.path / layout.CONFIG, dump_redacted(config))
        write_atomically(
            self.path / layout.OVERRIDES,
            "".join(f"- {json.dumps(redact(text))}\n" for text in overrides),
        )
        self.write_record(record)
        write_atomically(
            self.path / layout.ENVIRONMENT, json.dumps(describe_environment(), indent=1)
        )
        return notes

    def first_left(self, step: int, resume_from: Path) -> int:
        """Return the first step whose checkpoint in this folder is left behind.

        If the run resumes from elsewhere, its own checkpoint of the same step is left behind too.
        """
        own = layout.checkpoint_folder(self.path, step)
        return step + 1 if resume_from.resolve() == own.resolve() else step

    def restore(self, checkpoint: Path) -> None:
        """Copy the files that a fetched checkpoint contains and the run folder lacks."""
        state = read_trainer_state(checkpoint)
        for name, text in ((layout.METRICS, None), (layout.TRACKER_RUN_ID, state.tracker_run_id)):
            target = self.path / name
            source = checkpoint / name
            if target.exists() or (text is None and not source.is_file()):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, source.read_bytes() if text is None else text)

    def read_record(self) -> RunRecord:
        """Read ``plan.json``; an empty record where there is none that is whole."""
        try:
            return RunRecord.from_json((self.path / layout.PLAN).read_bytes())
        except (FileNotFoundError, ValueError):
            return RunRecord()

    def write_record(self, record: RunRecord) -> None:
        """Write ``plan.json``."""
        write_atomically(self.path / layout.PLAN, record.to_json())

    def has_work(self) -> bool:
        """Tell whether the folder holds checkpoints or metrics, which must not be overwritten."""
        return bool(find_checkpoints(self.path)) or any(
            "loss" in r for r in read_metrics(self.path / layout.METRICS)
        )


def open_run_folder(path: Path, say: Callable[[str], None]) -> RunFolder:
    """Make the folder if it is missing; no other user may write into it.

    Raises:
        CheckpointError: It cannot be made or written, others may write into it, or links lead out
            of it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"output_dir={path}: {error.strerror}; take another output_dir="
        ) from error
    if not os.access(path, os.W_OK):
        raise CheckpointError(f"output_dir={path}: not writable; take another output_dir=")
    check_links(path)
    note = close_run_folder(path)
    if note:
        say(note)
    return RunFolder(path)


def describe_environment() -> dict[str, str]:
    """Return the versions that affect the losses."""
    packages = (
        "torch",
        "deepspeed",
        "transformers",
        "peft",
        "bitsandbytes",
        "datasets",
        "hydra-core",
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "llmtune": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        **versions,
    }


def find_config_changes(folder: Path, config: Config) -> list[str]:
    """Compare the configuration stored in a run folder or checkpoint with the current one.

    Returns:
        The differences that do not matter, as ``key: old -> new``.

    Raises:
        CheckpointError: With the differences that matter.
    """
    stored = folder / layout.CONFIG
    if not stored.is_file():
        raise CheckpointError(f"{folder}: no {layout.CONFIG} in it")
    return compare_stored_config(stored.read_bytes(), str(folder), config)


def compare_stored_config(
    stored: bytes, where: str, config: Config, other: str = "output_dir="
) -> list[str]:
    """Compare a stored configuration with the current one; see :func:`find_config_changes`.

    Args:
        where: The run folder or checkpoint that it is of.
        other: The key to change for a new run.
    """
    try:
        old = load_bytes(stored, f"{where}/{layout.CONFIG}")
    except ConfigError as error:
        raise CheckpointError(f"{where} was written by another version: {error}") from error
    # What is stored holds no secrets.
    differences = _differences(redact_config(old), redact_config(config))
    in_identity = [(key, a, b) for key, a, b in differences if is_identity(key)]
    if in_identity:
        raise ForeignRunError(
            f"{where} belongs to a run with another configuration:\n"
            + "\n".join(f"  {key}: {a} there, {b} now" for key, a, b in in_identity)
            + f"\nTake the old values, or another run_name= or {other}"
        )
    return [f"{key}: {a} -> {b}" for key, a, b in differences if key not in _NO_DIFFERENCE]


def fingerprint(config: Config) -> str:
    """Hash the configuration that identifies a run."""
    values = {
        key: value for key, value in _flatten(redact_config(config)).items() if is_identity(key)
    }
    return short_hash(json.dumps(values, sort_keys=True, default=str).encode())


def is_identity(key: str) -> bool:
    """Tell whether a run with another value of this dotted key is another run."""
    if key in NO_IDENTITY:
        return False
    return key.split(".")[0] in IDENTITY or key in TRAIN_IDENTITY


def _differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    before, after = _flatten(old), _flatten(new)
    differences: list[tuple[str, Any, Any]] = []
    for key in sorted(before.keys() | after.keys()):
        differences += _compare(key, before.get(key), after.get(key))
    return differences


def _compare(key: str, before: Any, after: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield a value that differs; of two dictionaries, each key that does."""
    if before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys(), key=str):
            yield from _compare(f"{key}.{name}", before.get(name, _UNSET), after.get(name, _UNSET))
    else:
        yield key, before, after


def _flatten(config: Config) -> dict[str, Any]:
    """Return the plain values by dotted key."""
    flat: dict[str, Any] = {}
    for group in fields(config):
        value = getattr(config, group.name)
        if hasattr(value, "__dataclass_fields__"):
            flat |= {f"{group.name}.{key}": _plain(item) for key, item in asdict(value).items()}
        else:
            flat[group.name] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
