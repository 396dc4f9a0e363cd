"""Read the settings that a resumed run was started with.

They are needed before the run is planned, and before any checkpoint is fetched.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from omegaconf.errors import OmegaConfBaseException

from llmtune.checkpoint.find import find_checkpoints
from llmtune.checkpoint.mirror import find_remote, read_remote
from llmtune.config.groups.train import TrainConfig
from llmtune.config.schema import Config
from llmtune.config.stored import parse_yaml
from llmtune.errors import ConfigError
from llmtune.storage import layout
from llmtune.train.run_folder import RunFolder


def begun_train(config: Config, folder: Path, run_name: str) -> TrainConfig | None:
    """Read the ``train`` section that the run began with.

    It is None for a new run, and for one of another version of llmtune. It is looked for in the
    run folder, in the checkpoint that ``resume_from_checkpoint`` names, and at the mirror.

    Raises:
        ConfigError: The driver of the mirror is not installed.
        CheckpointError: Nothing is stored locally, and the mirror cannot be read.
    """
    text = _find(config, folder, run_name)
    try:
        return parse_yaml(text.decode()).train if text is not None else None
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, ConfigError):
        # The comparison of the configurations will say what is wrong with it.
        return None


def _find(config: Config, folder: Path, run_name: str) -> bytes | None:
    resume_from = config.resume_from_checkpoint
    if resume_from == "none":
        return None

    # Local folders first, the newest before older ones.
    candidates: list[Path] = []
    if RunFolder(folder).has_work():
        candidates += [folder, *reversed(find_checkpoints(folder))]
    if resume_from == "auto":
        # An earlier command may have named a checkpoint to begin from, with nothing saved since.
        began = RunFolder(folder).read_record().began_from
        if began is not None:
            candidates.append(Path(began.origin))
    elif "://" not in resume_from:
        candidates.append(Path(resume_from).expanduser())
    for candidate in candidates:
        if (candidate / layout.CONFIG).is_file():
            return (candidate / layout.CONFIG).read_bytes()

    # Then the URL that was named, or the mirror.
    if "://" in resume_from:
        return read_remote(resume_from, layout.CONFIG)
    if resume_from != "auto" or config.checkpoint.mirror is None:
        return None
    remote = find_remote(config.checkpoint.mirror, run_name)
    return read_remote(remote[-1][1], layout.CONFIG) if remote else None
