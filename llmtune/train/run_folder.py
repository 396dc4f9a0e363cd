"""The run folder: whose it is, where it stands, and what the command line may change between two starts."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from llmtune import __version__
from llmtune.checkpoint import names
from llmtune.checkpoint.find import find_checkpoints, sweep_incomplete
from llmtune.checkpoint.save import read_trainer_state
from llmtune.config.compose import dump_yaml, load_config
from llmtune.config.schema import Config
from llmtune.errors import CheckpointError, ConfigError
from llmtune.plan.resolve import Plan, StepsPlan
from llmtune.track.metrics import cut_metrics, read_metrics

#: What makes a run this run; anything else may differ between two starts.
IDENTITY = ("model", "data", "tuner", "optim", "schedule", "precision", "seed")
#: Keys of those groups that change how the work is done, not what comes out.
NO_IDENTITY = {"data.num_workers", "data.dataloader_num_workers", "data.pin_memory"}
TRAIN_IDENTITY = ("global_batch_size", "max_grad_norm")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A folder that belongs to this run."""

    path: Path

    @property
    def finished_step(self) -> int | None:
        """Last step of a run that went to its end."""
        file = self.path / names.FINISHED
        return int(json.loads(file.read_text())["step"]) if file.is_file() else None

    def check_owner(self, config: Config) -> None:
        """Refuse a folder of another run, or of no run.

        Raises:
            CheckpointError: With every difference.
        """
        stored = self.path / names.CONFIG
        if not stored.is_file():
            others = [entry.name for entry in self.path.iterdir() if entry.name not in (names.LOCK, names.LOG)]
            if others:
                raise CheckpointError(
                    f"output_dir={self.path} is not empty and not a run folder (it holds {', '.join(sorted(others)[:5])}); "
                    "take another output_dir= or run_name="
                )
            return
        if not self._has_work():
            return
        if config.resume_from_checkpoint == "none":
            raise CheckpointError(
                f"resume_from_checkpoint=none, but {self.path} holds a run already; take another output_dir= or "
                "run_name=, or remove the folder"
            )
        _check_same_run(self.path, config)

    def check_length(self, steps: StepsPlan, data_fingerprint: str) -> str | None:
        """Refuse a shorter run or other data; a note where the run is longer than before.

        Raises:
            CheckpointError: With what differs.
        """
        file = self.path / names.PLAN
        if not file.is_file() or not self._has_work():
            return None
        plan = json.loads(file.read_text())
        if plan["data"]["fingerprint"] != data_fingerprint:
            raise CheckpointError(
                f"the rows of data.train are not those that {self.path} was started with (a file, the tokenizer or "
                "the Python version changed); take another run_name= or output_dir="
            )
        before = int(plan["steps"]["total_steps"])
        if steps.total_steps < before:
            raise CheckpointError(
                f"{self.path} was started for {before} steps and would now have {steps.total_steps}, which is another "
                "schedule; take train.max_steps of at least as many, or another run_name= or output_dir="
            )
        if steps.total_steps > before:
            return f"longer than before: {before} -> {steps.total_steps} steps; the schedule now runs to the new end"
        return None

    def resume_point(self, config: Config) -> Path | None:
        """The checkpoint to go on from: the newest, or the one that is named.

        Raises:
            CheckpointError: It is incomplete, damaged, or of a run with another configuration.
        """
        wanted = config.resume_from_checkpoint
        if wanted == "none":
            return None
        if wanted == "auto":
            found = find_checkpoints(self.path)
            return found[-1] if found else None
        folder = Path(wanted).expanduser()
        read_trainer_state(folder)
        _check_same_run(folder, config)
        return folder

    def begin(self, config: Config, overrides: list[str], plan: Plan, extra: dict[str, Any], step: int) -> list[str]:
        """Write what describes the run, and set aside what lies beyond ``step``; sentences on what went."""
        notes = [f"removed what a save that was cut off left behind: {name}" for name in sweep_incomplete(self.path)]
        for folder in find_checkpoints(self.path):
            if (names.checkpoint_step(folder) or 0) > step >= 0:
                aside = folder.with_name(f"superseded-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                notes.append(f"{folder.name} is beyond step {step} and was renamed to {aside.name}")
        (self.path / names.FINISHED).unlink(missing_ok=True)
        cut_metrics(self.path / names.METRICS, step)
        (self.path / names.CONFIG).write_text(dump_yaml(config))
        (self.path / names.OVERRIDES).write_text("".join(f"- {json.dumps(text)}\n" for text in overrides))
        (self.path / names.PLAN).write_text(json.dumps({**plan.to_dict(), **extra}, indent=1))
        (self.path / names.ENVIRONMENT).write_text(json.dumps(describe_environment(), indent=1))
        return notes

    def read_history(self) -> list[dict[str, Any]]:
        """Rungs of the ladder on which this run ran out of memory."""
        file = self.path / names.PLAN
        return list(json.loads(file.read_text()).get("history", [])) if file.is_file() else []

    def write_history(self, history: list[dict[str, Any]]) -> None:
        """Put them into the plan's file."""
        file = self.path / names.PLAN
        file.write_text(json.dumps({**json.loads(file.read_text()), "history": history}, indent=1))

    def _has_work(self) -> bool:
        """Whether there is anything to lose."""
        return bool(find_checkpoints(self.path)) or any("loss" in r for r in read_metrics(self.path / names.METRICS))


def open_run_folder(path: Path) -> RunFolder:
    """Make the folder where it is missing.

    Raises:
        CheckpointError: It cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"output_dir={path}: {error.strerror}; take another output_dir=") from error
    if not os.access(path, os.W_OK):
        raise CheckpointError(f"output_dir={path}: not writable; take another output_dir=")
    return RunFolder(path)


def describe_environment() -> dict[str, str]:
    """Versions that shape the numbers."""
    packages = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets", "hydra-core")
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return {"llmtune": __version__, "python": sys.version.split()[0], "platform": platform.platform(), **found}


def _check_same_run(folder: Path, config: Config) -> None:
    """Compare the configuration stored in a run folder or checkpoint with the one of now."""
    stored = folder / names.CONFIG
    try:
        differences = _differences(load_config(stored), config)
    except ConfigError as error:
        raise CheckpointError(f"{stored} was written by another version: {error}") from error
    if differences:
        raise CheckpointError(
            f"{folder} belongs to a run with another configuration:\n"
            + "\n".join(f"  {key}: {old} there, {new} now" for key, old, new in differences)
            + "\nTake the old values, or another run_name= or output_dir="
        )


def _differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    found = []
    for group in IDENTITY:
        before, after = _plain(getattr(old, group)), _plain(getattr(new, group))
        if not isinstance(before, dict):
            before, after = {"": before}, {"": after}
        found += [
            (f"{group}.{key}" if key else group, before[key], after[key])
            for key in before
            if before[key] != after[key] and f"{group}.{key}" not in NO_IDENTITY
        ]
    for key in TRAIN_IDENTITY:
        if getattr(old.train, key) != getattr(new.train, key):
            found.append((f"train.{key}", getattr(old.train, key), getattr(new.train, key)))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if hasattr(value, "__dataclass_fields__"):
        return {key: item.value if isinstance(item, Enum) else item for key, item in asdict(value).items()}
    return value
