"""Convert configs to text and back: ``config.yaml`` of a run, and the request of the ranks."""

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

#: Size limit of a stored config, which lists a few hundred sources at most.
_MOST_BYTES = 16 << 20


def load_config(path: Path) -> Config:
    """Read a run folder's ``config.yaml``, which is untrusted: nothing in it is interpolated.

    Raises:
        ConfigError: The file is missing, is a link to elsewhere, or holds keys that this version
            does not know.
    """
    if not path.is_file():
        raise ConfigError(f"{path.parent} is not a run folder: it has no {path.name}")
    with open_foreign(path, ConfigError, _MOST_BYTES) as file:
        return load_bytes(file.read(_MOST_BYTES), str(path))


def load_bytes(stored: bytes, where: str) -> Config:
    """Read a config from the bytes of a file.

    Args:
        where: The name of the file in errors.

    Raises:
        ConfigError: They are no configuration, or hold keys that this version does not know.
    """
    try:
        return parse_yaml(stored.decode())
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {first_line(error)}") from error


def parse_yaml(text: str) -> Config:
    """Undo :func:`dump_yaml`; every text is literal.

    Raises:
        OmegaConfBaseException: It is not a config of this version.
        ConfigError: A mandatory value is missing, or it is something else than keys and values.
    """
    values = yaml.safe_load(text)
    if not isinstance(values, dict):
        raise ConfigError(f"no configuration, but {str(values)[:40]!r}")
    return from_plain(values)


def from_plain(values: dict[str, Any]) -> Config:
    """Undo :func:`to_plain`.

    Raises:
        As :func:`parse_yaml`.
    """
    return to_config(OmegaConf.merge(schema(), to_literal(take_out_aliases(values))))


def take_out_aliases(values: dict[str, Any]) -> dict[str, Any]:
    """Copy plain values, with those under an alias moved to the key that it names."""
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
    """Return all keys with types and defaults, as a node to merge with and not to change."""
    schema: DictConfig = OmegaConf.structured(Config)
    return schema


def to_plain(config: Any) -> Any:
    """Convert a config to dictionaries and lists, with the names of enum members."""
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
    """Write a config as text that :func:`load_config` reads."""
    return to_yaml(to_plain(config))


def dump_redacted(config: Config) -> str:
    """Write a config without secrets, for a file that is kept."""
    return dump_yaml(redact_config(config))


def redact_config(config: Config) -> Config:
    """Replace secrets by ``***NAME***``; stored configs are like that, and compare with these."""
    redacted: Config = _redacted(config)
    return redacted


def _redacted(config: Any) -> Any:
    if is_dataclass(config) and not isinstance(config, type):
        return replace(
            config, **{item.name: _redacted(getattr(config, item.name)) for item in fields(config)}
        )
    return redact_values(config)


def to_config(node: Any) -> Config:
    """Convert a composed node to a :class:`Config`.

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
    """Return the value of a dotted key, also inside dictionaries; None where it does not exist."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else getattr(config, part, None)
    return config


def first_line(error: BaseException) -> str:
    """Describe an error of a library in one line."""
    return " ".join(line.strip() for line in str(error).splitlines()[:2] if line.strip())


def set_key(config: Any, key: str, value: Any) -> None:
    """Set a dotted key, also inside dictionaries."""
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
