"""A config with the choices and overrides that it was composed from."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from llmtune.config.keys import ALIASES, known_keys
from llmtune.config.schema import Config
from llmtune.config.stored import dump_yaml, read_key, set_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """A composed config, and the choices and overrides behind it."""

    config: Config
    choices: dict[str, str | None]
    """Config group -> chosen option."""
    overrides: list[str]
    """The overrides as they were typed."""
    unnamed: frozenset[str]
    """Groups (``model``, ``data``) without a name, for which the default job's are used."""

    @property
    def yaml(self) -> str:
        """The composed config as text."""
        return dump_yaml(self.config)

    @property
    def keys(self) -> list[str]:
        """Groups and dotted keys of the command line."""
        names = (override.lstrip("+~").partition("=")[0] for override in self.overrides)
        return [ALIASES.get(name, name) for name in names]

    def explicit(self, key: str) -> bool:
        """Tell whether the command line set ``key`` (a group or a dotted key)."""
        return key in self.keys


def with_overrides(stored: Config, composed: Composed) -> Config:
    """Return a stored config with the groups and keys of the command line on top."""
    config = copy.deepcopy(stored)
    known = known_keys()
    # Overlays such as debug=trace are no keys; of theirs, only ``trace`` matters to a stored run.
    for key in [*composed.keys, "trace"]:
        value = read_key(composed.config, key)
        if value is not None or key in known:
            set_key(config, key, copy.deepcopy(value))
    return config
