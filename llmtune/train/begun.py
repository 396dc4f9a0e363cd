"""What a run was started with, where it goes on: read before it is planned, and before anything of
it is fetched.
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
    """The ``train`` section that the run began with; None for a new run, and for one of another
    version of llmtune.

    Looked for in the run folder, in the checkpoint that ``resume_from_checkpoint`` names, and at
    the mirror.

    Raises:
        ConfigError: The driver of the mirror is not installed.
        CheckpointError: Nothing is here, and the mirror cannot be read.
    """
    text = _find(config, folder, run_name)
    try:
        return parse_yaml(text.decode()).train if text is not None else None
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, ConfigError):
        # Whoever compares the configurations says what is wrong with it.
        return None


def _find(config: Config, folder: Path, run_name: str) -> bytes | None:
    wanted = config.resume_from_checkpoint
    if wanted == "none":
        return None
    places = [folder, *reversed(find_checkpoints(folder))] if RunFolder(folder).has_work() else []
    if wanted == "auto":
        # An earlier command may have named where it begins, and nothing have been saved since.
        began = RunFolder(folder).read_record().began_from
        places += [Path(began.origin)] if began is not None else []
    elif "://" not in wanted:
        places.append(Path(wanted).expanduser())
    for place in places:
        if (place / layout.CONFIG).is_file():
            return (place / layout.CONFIG).read_bytes()
    if "://" in wanted:
        return read_remote(wanted, layout.CONFIG)
    if wanted != "auto" or config.checkpoint.mirror is None:
        return None
    remote = find_remote(config.checkpoint.mirror, run_name)
    return read_remote(remote[-1][1], layout.CONFIG) if remote else None
