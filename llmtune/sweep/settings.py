"""Check a sweep before anything starts, and put together what it needs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtune.config.compose import compose_config, config_groups
from llmtune.config.composed import Composed
from llmtune.config.foreign import meant_by
from llmtune.config.groups.verbs.hparams_search import Sampler
from llmtune.config.keys import ALIASES, is_free, known_keys
from llmtune.config.schema import Config
from llmtune.config.stored import redact_config, to_plain
from llmtune.data.read.parse_sources import check_local_files
from llmtune.errors import ConfigError
from llmtune.report.settings_table import flatten
from llmtune.run.attempt import resolve_run_target
from llmtune.run.settings import find_problems
from llmtune.run.task import adopt_task
from llmtune.security.redaction import redact_values
from llmtune.sweep.objective import (
    Objective,
    find_objective_problems,
    resolve_objective,
    resolve_pruning,
)
from llmtune.sweep.runner import TrialCommand
from llmtune.sweep.space import PREFIX, Parameter, count_points, read_space, to_overrides
from llmtune.train.run_folder import is_identity
from llmtune.tuner.tuner import TUNERS

_GROUP = "hparams_search"
#: Keys and groups that are no part of a training's result.
_NO_TRAINING = {
    *("output_dir", "run_name", "resume_from_checkpoint", "trace", "key", _GROUP),
    *(
        "chat",
        "predict",
        "serve",
        "target",
        "report",
        "runs",
        "paths",
        "tracker",
        "export",
        "debug",
    ),
    *("experiment", "launch", "hardware"),
}
#: Keys that choose the rows by which trials are compared, and those that do without ``data.eval``.
_HELD_OUT = ("data.eval", "data.val_set_size", "train.eval_max_rows")
_SPLIT = ("seed", "data.train", "data")
#: Keys of ``train`` that change no value of a trial.
_NO_RESULT = {
    f"train.{name}"
    for name in (
        *("save_strategy", "save_steps", "save_total_limit", "logging_steps", "sample_answers"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
        "per_device_eval_batch_size",
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings:
    """All that is known of a sweep before its first trial."""

    config: Config
    folder: Path
    space: list[Parameter]
    objective: Objective
    prunes: bool
    command: TrialCommand
    command_line: str
    """The sweep's own command line."""

    def to_record(self) -> dict[str, Any]:
        """Return what is stored of it (:mod:`llmtune.sweep.record`)."""
        searched = {parameter.key for parameter in self.space}
        settings = flatten(to_plain(redact_config(self.config)))
        return {
            "space": {parameter.key: parameter.to_plain() for parameter in self.space},
            "goal": self.objective.goal,
            "settings": {
                key: value
                for key, value in settings.items()
                if _is_result(key) and key not in searched and key.split(".")[0] not in searched
            },
            "trials": self.config.hparams_search.trials,
            "command": redact_values(asdict(self.command)),
        }


def resolve_sweep(composed: Composed, config_dir: str | None) -> SweepSettings:
    """Check the search and the job of its trials.

    Raises:
        ConfigError: With every problem that was found.
        DataError: A file of the data is not there.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise ConfigError(
            "sweep starts the processes of its trials itself: start it with python -m llmtune"
            " sweep, without torchrun, deepspeed or srun"
        )
    # The job without the search, with all that train would refuse.
    own = [text for text in composed.overrides if not _is_of_sweep(text)]
    compose_config(own, config_dir, more_rules=find_problems)
    check_local_files(composed.config.data)
    composed = adopt_task(composed)
    config, search = composed.config, composed.config.hparams_search

    space, problems = read_space(search.space)
    problems += _find_space_problems(composed, space, config_dir)
    if not problems:
        problems += _find_value_problems(own, space, config_dir)
    objective = resolve_objective(config)
    problems += find_objective_problems(config, objective)
    if search.sampler is Sampler.grid and count_points(space) is None:
        endless = next(parameter for parameter in space if parameter.list_values() is None)
        problems.append(
            f"hparams_search.sampler=grid: {PREFIX}.{endless.key} has no end of values; give it"
            " choices, or a step"
        )
    if config.launch.hostfile is not None:
        problems.append("launch.hostfile: the trials of a sweep train on this machine alone")
    if problems:
        raise ConfigError.from_problems(problems)
    target = resolve_run_target(composed)
    folder = target.folder if config.output_dir else Path(f"{target.folder}-sweep")
    return SweepSettings(
        config=config,
        folder=folder,
        space=space,
        objective=objective,
        prunes=resolve_pruning(config),
        command=TrialCommand(
            overrides=own,
            default_overrides=_default_overrides(composed),
            plan_overrides=["data=stdlib_docs"] if "data" in composed.unnamed else [],
            config_dir=config_dir,
            name=folder.resolve().name,
        ),
        command_line=_describe_command(composed, config_dir),
    )


def _is_of_sweep(override: str) -> bool:
    """Tell the overrides of the sweep from those of its trials."""
    name = override.lstrip("+~").partition("=")[0]
    return name.split(".")[0] == _GROUP or name in ("output_dir", "run_name")


def _is_result(key: str) -> bool:
    """Tell whether a key of the configuration may change the value of a trial."""
    return is_identity(key) or (key.startswith("train.") and key not in _NO_RESULT)


def _default_overrides(composed: Composed) -> list[str]:
    """Return what trials do without, unless it is asked for: exports, and answers to prompts."""
    keys = composed.keys
    found = []
    if not any(key.split(".")[0] == "export" for key in keys):
        found.append("export=none")
    if "train.sample_answers" not in keys:
        found.append("train.sample_answers=false")
    return found


def _describe_command(composed: Composed, config_dir: str | None) -> str:
    options = ["--config-dir", config_dir] if config_dir else []
    return shlex.join(["python", "-m", "llmtune", "sweep", *options, *composed.overrides])


def _find_space_problems(
    composed: Composed, space: Sequence[Parameter], config_dir: str | None
) -> Iterator[str]:
    """Find keys that are unknown, or cannot be searched."""
    config = composed.config
    if not config.hparams_search.space:
        yield (
            f"{PREFIX} is empty: take hparams_search=lora, full or classification, or say what is"
            f" searched: {PREFIX}.tuner.lora_r.choices=[8,16]"
        )
    groups, known = config_groups(config_dir), known_keys()
    tuner = TUNERS.find(config.tuner.kind)
    keys = {parameter.key for parameter in space}
    for parameter in space:
        key, name = parameter.key, f"{PREFIX}.{parameter.key}"
        group = key.split(".")[0]
        if key not in known and key not in groups and not is_free(key):
            names = known | set(groups) | set(ALIASES)
            yield f"{name}: unknown key {key!r}{meant_by(key, names)}"
        elif group in _NO_TRAINING:
            yield f"{name}: it is no part of what a trial trains, and cannot be searched"
        elif key in _HELD_OUT or (key in _SPLIT and config.data.eval is None):
            fix = "" if key in _HELD_OUT else "; name them with data.eval=FILE"
            yield f"{name}: the trials would be compared by different held-out rows{fix}"
        elif composed.explicit(key):
            yield f"{key} is set and searched; leave it out, or take {name}=null"
        elif key.startswith("tuner.lora") and not tuner.has_adapter and not keys & _TUNERS:
            fix = f"take {name}=null, or hparams_search=full"
            yield f"{name}: {tuner.title} does not read it; {fix}"


_TUNERS = {"tuner", "tuner.kind"}


def _find_value_problems(
    overrides: list[str], space: Sequence[Parameter], config_dir: str | None
) -> Iterator[str]:
    """Find values that train would refuse: choices, and both ends of ranges."""
    for parameter in space:
        for value in parameter.edges:
            (setting,) = to_overrides({parameter.key: value})
            try:
                compose_config([*overrides, setting], config_dir, more_rules=find_problems)
            except ConfigError as error:
                yield f"{PREFIX}.{parameter.key}: {setting} cannot be tried: {error}"
