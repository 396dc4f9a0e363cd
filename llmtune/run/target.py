"""Name a run, and its folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from llmtune.config.composed import Composed
from llmtune.config.schema import Config
from llmtune.data.read.parse_sources import parse_sources
from llmtune.storage import layout
from llmtune.train.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class RunTarget:
    """Name and folder of a run."""

    name: str
    folder: Path


def resolve_run_target(composed: Composed) -> RunTarget:
    """Resolve the run's name and folder.

    Without ``run_name`` the name is made of model, tuner and data, and of ZeRO where it was chosen.
    """
    config, choices = composed.config, composed.choices
    if config.run_name:
        name = config.run_name
    else:
        model = choices["model"]
        if model == "custom":
            model = Path(config.model.name_or_path).name.removesuffix(".gguf")
        data = choices["data"] if choices["data"] != "files" else _data_name(config)
        parts = [str(model), str(choices["tuner"]), str(data)]
        if choices.get("zero") not in (None, "auto"):
            parts.append(f"zero{choices['zero']}")
        if sweep_run := os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"):
            # The runs of a sweep differ in their overrides only.
            parts.append(sweep_run)
        name = "-".join(parts)
    return RunTarget(name, Path(config.output_dir or f"runs/{name}").expanduser())


def lock_file(folder: RunFolder) -> Path:
    """Return the lock file of a run folder."""
    return folder.path / layout.LOCK


def _data_name(config: Config) -> str:
    """Return the name of the first file, without its ending."""
    path = parse_sources(config.data.train, "data.train", config.data.format)[0].path
    return Path(path.split("*")[0].rstrip("/")).name.split(".")[0] or "data"
