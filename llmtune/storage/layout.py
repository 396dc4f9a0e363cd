"""The names of the files and folders of a run folder, and of a sweep's."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

CONFIG = "config.yaml"
OVERRIDES = "overrides.yaml"
PLAN = "plan.json"
ENVIRONMENT = "environment.json"
BAD_ROWS = "bad_rows.jsonl"
METRICS = "metrics.jsonl"
LOG = "train.log"
SAMPLES = "samples.json"
LOSS_PLOT = "loss.png"
TIME = "time.json"
PROFILE = "profile"
PROFILE_SUMMARY = "profile/summary.md"
CONFUSION_TABLE = "confusion_matrix.json"
CONFUSION_PLOT = "confusion_matrix.png"
FINISHED = "finished.json"
ENDED = "ended.json"
REPORT = "report.html"
DATA_EXAMPLES = "data_examples.json"
LOCK = ".lock"
RESTARTS = "restarts.jsonl"
#: What a rank of a foreign launcher leaves when it runs out of memory, for the next start.
MEMORY_FAILURES = ".out-of-memory-*.json"
SAVE_REQUEST = "SAVE"
TRACKER_RUN_ID = "wandb/run_id"
TENSORBOARD = "tensorboard"
MLFLOW = "mlflow"
SKIPPED_STEPS = "skipped_steps.json"

#: Of a sweep's folder, in which every trial has a run folder.
STUDY = "study.db"

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"
COMPLETE = "COMPLETE"
TRAINER_STATE = "trainer_state.json"

#: peft's names of the files of an adapter, and transformers' of the files of a model: one file of
#: weights, or several and their index.
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MODEL_WEIGHTS = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"

ADAPTER = "adapter"
MODEL = "model"
MERGED = "merged"
_EXPORT = "export"
_MERGED_FORMAT = "safetensors"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STATE_FILES = "optimizer-*.safetensors"
_STATE_FILE = re.compile(r"optimizer-(\d+)-of-(\d+)\.safetensors")

#: The entry of a state file's header with the offsets of its slices.
STATE_SLICES = "llmtune_slices"
#: That with how its numbers are stored, by their name; without it they are fp32.
STATE_STORAGES = "llmtune_storages"
#: A parameter's master weight among its tensors in a state file.
MASTER_WEIGHT = "master"


def trace_file(run: Path, rank: int) -> Path:
    """Return the file of a rank with the trace of some steps."""
    return run / PROFILE / f"trace-{rank:05d}.json.gz"


def memory_failure_file(run: Path, rank: int) -> Path:
    """Return the file in which a rank says that it ran out of memory."""
    return run / MEMORY_FAILURES.replace("*", str(rank))


def trial_folder(sweep: Path, number: int) -> Path:
    """Return the run folder of a trial: ``trial-0003``."""
    return sweep / f"trial-{number:04d}"


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return the folder of a checkpoint: ``checkpoint-<step>``."""
    return run / f"checkpoint-{step}"


def result_folder(run: Path, has_adapter: bool) -> Path:
    """Return the folder of what a run trained: an adapter, or a whole model."""
    return run / (ADAPTER if has_adapter else MODEL)


def is_result_folder(folder: Path, run: Path) -> bool:
    """Tell whether a folder is what a run trained, and not one of its checkpoints."""
    return folder.name in (ADAPTER, MODEL) and folder.resolve().parent == run.resolve()


def export_folder(run: Path, export_format: str) -> Path:
    """Return the folder of an export: ``merged`` for safetensors, else ``export-<format>``."""
    return run / (MERGED if export_format == _MERGED_FORMAT else f"{_EXPORT}-{export_format}")


def is_export_folder(folder: Path) -> bool:
    """Tell whether a folder of a run has the name of an export."""
    return folder.name == MERGED or (
        folder.name.startswith(f"{_EXPORT}-") and not folder.name.endswith(".tmp")
    )


def checkpoint_step(folder: Path) -> int | None:
    """Return the step in a checkpoint folder's name; None for any other name."""
    match = _CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else None


def state_file(rank: int, world_size: int) -> str:
    """Return the name of the file with a rank's share of master weights and moments."""
    return f"optimizer-{rank:05d}-of-{world_size:05d}.safetensors"


def is_state_file(name: str) -> bool:
    """Tell whether a file of a checkpoint holds a rank's share of master weights and moments."""
    return fnmatchcase(name, STATE_FILES)


def state_file_ranks(name: str) -> tuple[int, int] | None:
    """Return rank and number of ranks in a state file's name; None for any other name."""
    match = _STATE_FILE.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None
