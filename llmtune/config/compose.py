"""Compose ``conf/`` and the overrides into one typed config, and report all problems at once.

Hydra composes the groups through its compose API, because llmtune has its own verbs and exit codes.
llmtune itself then sets single keys, so that a text arrives as it was typed. Unknown groups,
options and keys, which Hydra would report one at a time, are found before that, each with the
nearest known one.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmtune.config import rules
from llmtune.config.compose_errors import describe_compose_error
from llmtune.config.composed import Composed
from llmtune.config.keys import PROMPTS, YAML_ALIASES
from llmtune.config.literal import rename_interpolations, to_literal, without_interpolations
from llmtune.config.overrides import Choice, Setting, read_override
from llmtune.config.schema import Config
from llmtune.config.stored import first_line, read_key, schema, take_out_aliases, to_config
from llmtune.errors import ConfigError
from llmtune.security.trust import find_owner_problem

PRIMARY = "train"

#: Groups whose default option needs a name -> the key of that name, the default option of
#: ``conf/train.yaml``, and the option of the default job.
_NAMED = {
    "model": ("name_or_path", "custom", "smollm2_135m"),
    "data": ("train", "files", "stdlib_docs"),
}


#: Groups whose options set the keys of the same name; options of other groups are overlays, which
#: set any key.
_GROUPS_OF_KEYS = {item.name for item in fields(Config)}
_HEADER = re.compile(r"#\s*@")
_PACKAGE = re.compile(r"#\s*@package\s+_global_\s*")
_NO_VALUE = "no value"
#: A resolver with its argument, such as ``${oc.env:HF_TOKEN}``; its name may be interpolated too.
_LOOKUP = re.compile(r"\$\{[^:\n]*:")


@dataclass(slots=True)
class _CommandLine:
    """The parsed overrides."""

    choices: dict[str, str]
    """Config group -> the override for Hydra."""
    settings: dict[str, Any]
    """Dotted key -> value, in the order of the command line."""
    config_dir: str | None


def compose_config(
    overrides: list[str],
    config_dir: str | None = None,
    planning: bool = False,
    more_rules: Callable[[Config], list[str]] | None = None,
) -> Composed:
    """Compose a config, type it, and apply the rules.

    Args:
        overrides: Hydra overrides; ``+group=x`` and ``group=x`` mean the same.
        config_dir: A folder with the user's group files, which take precedence.
        planning: Nothing will be trained. Where a model or an experiment is named and no data, the
            length of rows is the default of ``data.max_seq_length``, not that of the embedded data.
        more_rules: Returns the problems that only higher layers can find.

    Raises:
        ConfigError: With every problem that was found.
    """
    groups = config_groups(config_dir)
    problems: list[str] = []
    line = _CommandLine({}, {}, config_dir)
    typed = copy.deepcopy(schema())
    for text in overrides:
        try:
            override = read_override(text, groups)
            _keep(override, line, typed)
        except ConfigError as error:
            problems.append(str(error))
    problems += _remove_misplaced(line)
    node, choices, unnamed = _compose_named(line, problems, planning)
    try:
        problems += _fill_missing(node)
        config = to_config(node)
    except OmegaConfBaseException as error:
        # Such as an interpolation of an unknown key in a user's file.
        raise ConfigError.from_problems([*problems, first_line(error)]) from error
    problems += rules.find_problems(config)
    if more_rules is not None:
        problems += more_rules(config)
    if problems:
        raise ConfigError.from_problems(problems)
    return Composed(config=config, choices=choices, overrides=list(overrides), unnamed=unnamed)


def config_groups(config_dir: str | None = None) -> dict[str, set[str]]:
    """Return the options of each group, from the packaged ``conf/`` and the user's folder."""
    groups: dict[str, set[str]] = {}
    if config_dir:
        _check_lookups(Path(config_dir).expanduser())
    for root in _roots(config_dir):
        if not root.is_dir():
            raise ConfigError(f"--config-dir {root}: no such folder")
        for file in root.glob("*/*.yaml"):
            # conf/sweep/ holds W&B sweep files, which are no Hydra group.
            if file.parent.name != "sweep":
                groups.setdefault(file.parent.name, set()).add(file.stem)
    return groups


def _check_lookups(root: Path) -> None:
    """Refuse another user's files with resolvers, which could put keys of this user into a URL.

    Raises:
        ConfigError: With the first such file.
    """
    for file in sorted(
        file for depth in ("*", "*/*", "*/*/*") for file in root.glob(f"{depth}.yaml")
    ):
        problem = find_owner_problem(file)
        if problem is not None and _LOOKUP.search(
            file.read_text(encoding="utf-8", errors="replace")
        ):
            raise ConfigError(
                f"--config-dir {root}: {file} {problem}, and it looks things up (${{...:...}}),"
                " which can send your keys elsewhere. Read it, and copy it into a folder of"
                " your own"
            )


def _roots(config_dir: str | None) -> list[Path]:
    own = [Path(config_dir).expanduser()] if config_dir else []
    return [*own, Path(str(resources.files("llmtune.conf")))]


def _keep(override: Choice | Setting, line: _CommandLine, typed: DictConfig) -> None:
    """Store a choice, or a setting if its type is right; later ones win.

    Args:
        typed: An empty schema to try values on, so that a wrong type is reported with its key.
    """
    if isinstance(override, Choice):
        line.choices.pop(override.group, None)
        # Hydra does not accept null; overlays are off by default.
        if override.option is not None or override.text.startswith("~"):
            line.choices[override.group] = override.text
        return
    try:
        _update(typed, override.key, override.value)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{override.key}={override.value}: {first_line(error)}") from error
    line.settings.pop(override.key, None)
    line.settings[override.key] = override.value


def _fill_missing(node: DictConfig) -> list[str]:
    """Fill missing mandatory values so that the rules can run; return them as problems."""
    missing, defaults = sorted(OmegaConf.missing_keys(node)), Config()
    for key in missing:
        default = read_key(defaults, key)
        _update(node, key, _NO_VALUE if default is None or default == MISSING else default)
    return [f"{key} has no value: add {key}=VALUE" for key in missing]


def _remove_misplaced(line: _CommandLine) -> list[str]:
    """Remove the user's overlays without ``@package _global_``; return them as problems."""
    problems = []
    for group, text in list(line.choices.items()):
        name = text.partition("=")[2].strip("'")
        found = [
            file
            for root in _roots(line.config_dir)
            if (file := root / group / f"{name}.yaml").is_file()
        ]
        if group in _GROUPS_OF_KEYS or not found:
            continue
        lines = filter(None, map(str.strip, found[0].read_text(encoding="utf-8").splitlines()))
        # Hydra reads no further, not even behind a comment (``ConfigSource._get_header_dict``).
        header = itertools.takewhile(_HEADER.match, lines)
        if not any(_PACKAGE.fullmatch(entry) for entry in header):
            del line.choices[group]
            problems.append(
                f"{group}={name}: {found[0]} needs '# @package _global_' as its first line, or"
                f" Hydra takes its keys for those of {group!r}, which has none"
            )
    return problems


def _compose_named(
    line: _CommandLine, problems: list[str], planning: bool
) -> tuple[DictConfig, dict[str, str | None], frozenset[str]]:
    """Compose; where nobody named a model or data, compose again with those of the default job.

    The names that an experiment sets are known only after composing.
    """
    given = set(line.settings)
    node, choices = _compose_node(line, problems)
    free = {
        group
        for group, (_, option, _) in _NAMED.items()
        if group not in line.choices and choices[group] == option
    }
    unnamed = {group for group in free if OmegaConf.is_missing(node[group], _NAMED[group][0])}
    base = line.settings.get("target.base")
    if "model" in unnamed and base:
        line.settings["model.name_or_path"] = base
        unnamed.discard("model")
    defaults = unnamed | ({"data"} if "data" in free and _is_embedded(node) else set())
    if planning and "data" in unnamed and ("model" not in unnamed or choices["experiment"]):
        line.settings["data.train"] = _NAMED["data"][2]
        defaults.discard("data")
    for group in defaults:
        line.choices[group] = f"{group}='{_NAMED[group][2]}'"
    if defaults or line.settings.keys() - given:
        node, choices = _compose_node(line, problems)
    _drop_wheel(node, choices["model"], line)
    return node, choices, frozenset(unnamed)


def _is_embedded(node: DictConfig) -> bool:
    """Tell whether all training data is the embedded data set."""
    if OmegaConf.is_missing(node.data, "train"):
        return False
    sources = node.data.train
    listed = sources if OmegaConf.is_list(sources) else [sources]
    return len(listed) > 0 and all(
        str(source).partition("@")[0] == _NAMED["data"][2] for source in listed
    )


def _drop_wheel(node: DictConfig, option: str | None, line: _CommandLine) -> None:
    """Unset the wheel of a model option whose model an experiment or the user replaced."""
    if node.model.wheel is None or "model.wheel" in line.settings:
        return
    files = [
        file
        for root in _roots(line.config_dir)
        if (file := root / "model" / f"{option}.yaml").is_file()
    ]
    own = yaml.safe_load(files[0].read_text(encoding="utf-8")) if files else {}
    if own.get("wheel") == node.model.wheel and own.get("name_or_path") != OmegaConf.select(
        node, "model.name_or_path"
    ):
        node.model.wheel = None


def _compose_node(
    line: _CommandLine, problems: list[str]
) -> tuple[DictConfig, dict[str, str | None]]:
    try:
        if line.config_dir:
            folder = Path(line.config_dir).expanduser().resolve()
            plain, choices = _compose_groups(
                *line.choices.values(), f"hydra.searchpath=['file://{_quoted(str(folder))}']"
            )
        else:
            plain, choices = _compose_packaged(*line.choices.values())
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        text = describe_compose_error(error.__cause__ or error)
        raise ConfigError.from_problems([*problems, text]) from error
    # Merging copies the schema.
    typed = OmegaConf.merge(schema(), plain)
    assert isinstance(typed, DictConfig)
    for key, value in line.settings.items():
        _update(typed, key, value)
    return typed, dict(choices)


def _compose_groups(*overrides: str) -> tuple[DictConfig, dict[str, str | None]]:
    """Let Hydra compose the chosen options; return the node, and the option of each group."""
    _store_schema()
    GlobalHydra.instance().clear()
    with initialize_config_module("llmtune.conf", version_base=None):
        node = compose(PRIMARY, overrides=list(overrides), return_hydra_config=True)
    choices = {
        str(key): value
        for key, value in node.hydra.runtime.choices.items()
        if not str(key).startswith("hydra/")
    }
    own = OmegaConf.masked_copy(node, [str(key) for key in node if key != "hydra"])
    _keep_prompts(own)
    # As it is written: what an interpolation gives is not known before the command line's keys.
    values = take_out_aliases(OmegaConf.to_container(own, resolve=False))  # type: ignore[arg-type]
    return OmegaConf.create(rename_interpolations(values, YAML_ALIASES)), choices


#: Cached, because the packaged files do not change while a process lives.
_compose_packaged = cache(_compose_groups)


@cache
def _store_schema() -> None:
    """Give Hydra the schema, in which users' files may use the earlier names of keys."""
    node = copy.deepcopy(schema())
    for key in YAML_ALIASES:
        OmegaConf.update(node, key, None, force_add=True)
    ConfigStore.instance().store("schema", node)


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")


def _update(node: DictConfig, key: str, value: Any) -> None:
    parts = key.split(".")
    for owner in (".".join(parts[:count]) for count in range(2, len(parts))):
        if OmegaConf.select(node, owner) is None:
            # A dictionary that is null by default, such as model.config.
            OmegaConf.update(node, owner, {}, merge=False, force_add=True)
    OmegaConf.update(node, key, to_literal(value), merge=True, force_add=True)


def _keep_prompts(node: DictConfig) -> None:
    """Keep prompts as they are in the YAML file, without interpolation."""
    for key in PROMPTS:
        group, _, name = key.partition(".")
        text = OmegaConf.to_container(node[group], resolve=False)[name]  # type: ignore[call-overload, index]
        if isinstance(text, str):
            OmegaConf.update(node, key, without_interpolations(text))
