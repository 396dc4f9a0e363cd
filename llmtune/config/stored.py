"""Configs as text and back: a run's ``config.yaml``, and what the ranks are given."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llmtune.config.keys import YAML_ALIASES
from llmtune.config.literal import from_literal, to_literal
from llmtune.config.schema import Config
from llmtune.errors import ConfigError
from llmtune.security.redaction import redact_values
from llmtune.security.trust import open_foreign
from llmtune.storage.yaml_text import to_yaml

#: Of a stored configuration, which lists some hundred sources at the most.
_MOST_BYTES = 16 << 20


def load_config(path: Path) -> Config:
    """The typed config of a run folder's ``config.yaml``, which may be anybody's: no variable is
    looked up for it.

    Raises:
        ConfigError: The file is missing, is a link to elsewhere, or holds keys that this version
            does not know.
    """
    if not path.is_file():
        raise ConfigError(f"{path.parent} is not a run folder: it has no {path.name}")
    with open_foreign(path, ConfigError, _MOST_BYTES) as file:
        return load_bytes(file.read(_MOST_BYTES), str(path))


def load_bytes(stored: bytes, where: str) -> Config:
    """The same of a file's bytes, wherever they come from.

    Args:
        where: What an error names.

    Raises:
        ConfigError: They hold keys that this version does not know, or are no configuration.
    """
    try:
        return parse_yaml(stored.decode())
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {first_line(error)}") from error


def parse_yaml(text: str) -> Config:
    """The inverse of :func:`dump_yaml`; every text stands for itself, whatever it looks like.

    Raises:
        OmegaConfBaseException: It is not a config of this version.
        ConfigError: A mandatory value is missing, or it is something else than keys and values.
    """
    values = yaml.safe_load(text)
    if not isinstance(values, dict):
        raise ConfigError(f"no configuration, but {str(values)[:40]!r}")
    return from_plain(values)


def from_plain(values: dict[str, Any]) -> Config:
    """A config from what :func:`to_plain` makes of one.

    Raises:
        As :func:`parse_yaml`.
    """
    return to_config(OmegaConf.merge(schema(), to_literal(_take_out_aliases(values))))


def _take_out_aliases(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config of an earlier version, with its targets at their present keys."""
    values = copy.deepcopy(values)
    for alias, key in YAML_ALIASES.items():
        owner, _, name = alias.rpartition(".")
        holder = values.get(owner) if owner else values
        if isinstance(holder, dict) and name in holder:
            value = holder.pop(name)
            group, _, present = key.partition(".")
            if value is not None:
                values.setdefault(group, {})[present] = value
    return values


@cache
def schema() -> DictConfig:
    """All keys with their types and defaults; to be merged with, which copies it, and not to be
    changed.
    """
    return OmegaConf.structured(Config)


def to_plain(config: Any) -> Any:
    """A config as dictionaries and lists, with the names of enums."""
    if is_dataclass(config):
        return {item.name: to_plain(getattr(config, item.name)) for item in fields(config)}
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, dict):
        return {key: to_plain(value) for key, value in config.items()}
    if isinstance(config, list):
        return [to_plain(value) for value in config]
    return config


def dump_yaml(config: Config) -> str:
    """The config as text that :func:`load_config` reads."""
    return to_yaml(to_plain(config))


def dump_redacted(config: Config) -> str:
    """The config as text for a file that is kept: without secrets."""
    return dump_yaml(redact_config(config))


def redact_config(config: Config) -> Config:
    """The config with ``***NAME***`` for secrets; compare two of these, since a stored config is
    one.
    """
    return _redacted(config)


def _redacted(config: Any) -> Any:
    if is_dataclass(config) and not isinstance(config, type):
        return replace(
            config, **{item.name: _redacted(getattr(config, item.name)) for item in fields(config)}
        )
    return redact_values(config)


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
    _take_literally(config)
    return config


def read_key(config: Any, key: str) -> Any:
    """The value of a dotted key, in dictionaries too; None where there is none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else getattr(config, part, None)
    return config


def first_line(error: BaseException) -> str:
    """An error of a library in one line."""
    return " ".join(line.strip() for line in str(error).splitlines()[:2] if line.strip())


def set_key(config: Any, key: str, value: Any) -> None:
    """Put a value at a dotted key, in dictionaries too."""
    part, _, rest = key.partition(".")
    if rest:
        inner = config.get(part) if isinstance(config, dict) else getattr(config, part)
        if inner is None:
            inner = {}
        set_key(inner, rest, value)
        value = inner
    if isinstance(config, dict):
        config[part] = value
    else:
        setattr(config, part, value)


def _take_literally(config: Any) -> None:
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            _take_literally(value)
        else:
            setattr(config, item.name, from_literal(value))
