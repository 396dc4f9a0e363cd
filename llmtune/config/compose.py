"""Compose ``conf/`` and the command line's overrides into one typed config, reporting every problem at once.

Hydra does the composition through its compose API, because llmtune has verbs and exit codes of its own. What Hydra
would report one at a time is looked for beforehand: unknown groups, options and keys, each with the nearest known one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmtune.config import rules
from llmtune.config.schema import Config
from llmtune.errors import ConfigError
from llmtune.secrets import redact_values

PRIMARY = "train"

#: Overlays; every other group needs an option.
_MAY_BE_NULL = {"experiment", "debug"}


@dataclass(frozen=True, slots=True)
class Composed:
    """A composed config and where it came from."""

    config: Config
    choices: dict[str, str | None]
    """Config group -> chosen option."""
    overrides: list[str]
    """The overrides as Hydra took them."""
    yaml: str
    """The composed config as text."""

    def explicit(self, key: str) -> bool:
        """Whether the command line set ``key`` (a group or a dotted key)."""
        return any(override.lstrip("+~").split("=", 1)[0] == key for override in self.overrides)


def compose_config(overrides: list[str], config_dir: str | None = None) -> Composed:
    """Compose, type and check.

    Args:
        overrides: Hydra overrides; ``+group=x`` and ``group=x`` mean the same.
        config_dir: A folder of a user's own group files, looked into first.

    Raises:
        ConfigError: With every problem that was found.
    """
    groups = config_groups(config_dir)
    problems: list[str] = []
    good: list[str] = []
    for text in map(_spell_out, overrides):
        problem, override = _check_override(text, groups)
        if problem:
            problems.append(problem)
        elif not override.endswith("='None'"):
            good.append(override)
    good = _own_choices(good)
    node, choices = _compose_node(good, config_dir, problems)
    config = to_config(node)
    problems += rules.problems(config)
    if problems:
        raise ConfigError.from_problems(problems)
    return Composed(config, choices, good, OmegaConf.to_yaml(node, resolve=True))


def load_config(path: Path) -> Config:
    """The typed config of a run folder's ``config.yaml``.

    Raises:
        ConfigError: The file is missing, or holds keys that this version does not know.
    """
    if not path.is_file():
        raise ConfigError(f"{path.parent} is not a run folder: it has no {path.name}")
    try:
        return to_config(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error


def with_overrides(stored: Config, composed: Composed) -> Config:
    """A run's stored config with what the command line said on top: whole groups, and single keys."""
    node = OmegaConf.structured(stored)
    given = OmegaConf.structured(composed.config)
    keys = [override.lstrip("+~").split("=", 1)[0] for override in composed.overrides]
    # Overlays such as debug=trace are no keys; of what they set, only this matters to a stored run.
    for key in [*(key for key in keys if OmegaConf.select(given, key) is not None or key in known_keys()), "trace"]:
        OmegaConf.update(node, key, OmegaConf.select(given, key), merge=False)
    return to_config(node)


def dump_yaml(config: Config) -> str:
    """The config as text that :func:`load_config` reads."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def dump_redacted(config: Config) -> str:
    """The config as text for a file that is kept: without secrets."""
    return dump_yaml(redact_config(config))


def redact_config(config: Config) -> Config:
    """The config with ``***NAME***`` for secrets; compare two of these, since a stored config is one."""
    values = redact_values(OmegaConf.to_container(OmegaConf.structured(config), resolve=True))
    return to_config(OmegaConf.merge(OmegaConf.structured(Config), values))


def to_config(node: Any) -> Config:
    """A composed node as a plain :class:`Config`.

    Raises:
        ConfigError: A mandatory value is missing.
    """
    missing = sorted(OmegaConf.missing_keys(node))
    if missing:
        raise ConfigError.from_problems([f"{key} has no value: add {key}=VALUE" for key in missing])
    config = OmegaConf.to_object(node)
    assert isinstance(config, Config)
    return config


def config_groups(config_dir: str | None = None) -> dict[str, set[str]]:
    """Config group -> its options, from the packaged ``conf/`` and a user's own folder."""
    groups: dict[str, set[str]] = {}
    roots = [Path(str(resources.files("llmtune.conf")))] + ([Path(config_dir)] if config_dir else [])
    for root in roots:
        if not root.is_dir():
            raise ConfigError(f"--config-dir {root}: no such folder")
        for file in root.glob("*/*.yaml"):
            # conf/sweep/ holds W&B sweep files, which are no Hydra group.
            if file.parent.name != "sweep":
                groups.setdefault(file.parent.name, set()).add(file.stem)
    return groups


def known_keys() -> set[str]:
    """Every dotted key of the schema."""
    return set(_walk(Config, ""))


def _walk(cls: type, prefix: str) -> Iterator[str]:
    hints = get_type_hints(cls)
    for item in fields(cls):
        hint = hints[item.name]
        yield prefix + item.name
        if is_dataclass(hint):
            yield from _walk(hint, f"{prefix}{item.name}.")  # type: ignore[arg-type]


def _text_keys(cls: type = Config, prefix: str = "") -> set[str]:
    """Dotted keys of type ``str``; ``data.train`` is not among them, because it may be a list."""
    found = set()
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint):
            found |= _text_keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif hint in (str, str | None):
            found.add(prefix + name)
    return found


def _own_choices(overrides: list[str]) -> list[str]:
    """A model or data named by path are not the defaults: drop what the default's YAML says about shape, wheel, lengths."""
    values = dict(override.split("=", 1) for override in overrides if "=" in override)
    if "model.name_or_path" in values:
        if not values.keys() & {"model", "experiment"}:
            overrides = ["model='custom'", *overrides]
        if "model.wheel" not in values:
            overrides = [*overrides, "model.wheel=null"]
    own_files = "data.train" in values and not values["data.train"].startswith("stdlib_docs")
    if own_files and not values.keys() & {"data", "experiment"}:
        overrides = ["data='files'", *overrides]
    return overrides


def _spell_out(text: str) -> str:
    """``checkpoint=FOLDER`` names a target, as ``run=FOLDER`` does, and is short for ``checkpoint.path=FOLDER``."""
    key, equals, value = text.partition("=")
    return f"checkpoint.path={value}" if equals and key.lstrip("+") == "checkpoint" else text


def _check_override(text: str, groups: dict[str, set[str]]) -> tuple[str | None, str]:
    """A problem, or the override in the form that Hydra wants."""
    try:
        text, override = _parse(text)
    except HydraException as error:
        return f"{text!r} is not KEY=VALUE: {_first_line(error)}", text
    key = override.key_or_group
    if override.is_delete():
        return (None, text) if key in groups else (f"{text!r}: only a config group can be removed with ~", text)
    value_text = text.split("=", 1)[1]
    if key in groups:
        value = override.value()
        # Quoted, because Hydra takes the option 3 of zero=3 for a number and refuses it.
        return _check_option(key, value, groups[key]), f"{key}='{value}'"
    if key.startswith(("model.config.", "zero.deepspeed.")):
        return None, f"++{key}={value_text}"
    keys = known_keys()
    if key not in keys:
        return f"unknown key {key!r}{_nearest(key, keys | set(groups))}", text
    # Free dictionaries are closed to new keys unless they are added by force.
    force = "++" if key in ("model.config", "zero.deepspeed") else ""
    return _check_value(key, override), f"{force}{key}={value_text}"


def _parse(text: str) -> tuple[str, Override]:
    """Parse an override; the value of a key that takes text is quoted first, and so are paths that are not grammar.

    Raises:
        HydraException: The text is no override.
    """
    parser = OverridesParser.create()
    key = text.partition("=")[0].lstrip("+")
    if key in _text_keys():
        text = _quote(text)
    try:
        return text, parser.parse_override(text)
    except HydraException:
        if key not in ("data.train", "data.eval"):
            raise
        return _quote(text), parser.parse_override(_quote(text))


def _quote(text: str) -> str:
    """Quote a value, so that commas, brackets and ``#`` in it are not Hydra's grammar."""
    name, _, value = text.partition("=")
    if value in ("null", "") or value[0] in "'\"":
        return text
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{name}='{escaped}'"


def _check_option(group: str, value: Any, options: set[str]) -> str | None:
    if str(value) in options or (value is None and group in _MAY_BE_NULL):
        return None
    known = ", ".join(sorted(options))
    return f"{group}={value}: no such option{_nearest(str(value), options)} ({group} has: {known})"


def _check_value(key: str, override: Override) -> str | None:
    """Set the one key in a copy of the schema, so that a wrong type is reported with its key."""
    try:
        OmegaConf.update(OmegaConf.structured(Config), key, override.value(), merge=True)
    except OmegaConfBaseException as error:
        return f"{key}={override.value()}: {_first_line(error)}"
    return None


def _compose_node(
    overrides: list[str], config_dir: str | None, problems: list[str]
) -> tuple[DictConfig, dict[str, str | None]]:
    ConfigStore.instance().store("schema", Config)
    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    GlobalHydra.instance().clear()
    with initialize_config_module("llmtune.conf", version_base=None):
        try:
            node = compose(PRIMARY, overrides=overrides + search, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            cause = error.__cause__ or error
            raise ConfigError.from_problems([*problems, _first_line(cause)]) from error
    choices = {
        str(key): value for key, value in node.hydra.runtime.choices.items() if not str(key).startswith("hydra/")
    }
    plain = OmegaConf.masked_copy(node, [str(key) for key in node if key != "hydra"])
    typed = OmegaConf.merge(OmegaConf.structured(Config), plain)
    assert isinstance(typed, DictConfig)
    return typed, choices


def _nearest(word: str, known: set[str]) -> str:
    """``": did you mean ...?"``, or nothing. A key is also compared without its group."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    if not close:
        tails: dict[str, str] = {key.rsplit(".", 1)[-1]: key for key in sorted(known)}
        tail = difflib.get_close_matches(word.rsplit(".", 1)[-1], list(tails), n=1, cutoff=0.75)
        close = [tails[tail[0]]] if tail else []
    return f": did you mean {close[0]!r}?" if close else ""


def _first_line(error: BaseException) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:2] if line.strip())
