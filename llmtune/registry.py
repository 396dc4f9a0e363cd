"""Register and find the variants of one kind, such as export formats, by name.

llmtune's own variants are in a folder, of which each module registers one. Plug-ins are modules
that ``LLMTUNE_PLUGINS`` names (separated by commas). They are imported wherever variants are looked
up, in the ranks too, so they must be installed or on ``PYTHONPATH``.
"""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from llmtune.errors import ConfigError
from llmtune.storage.hashing import sha256_files

PLUGINS = "LLMTUNE_PLUGINS"

#: The value of a key for which no variant is used: no export, no tracker.
NONE = "none"


class Named(Protocol):
    """A variant with a name."""

    @property
    def name(self) -> str:
        """The name in the configuration."""
        ...


Variant = TypeVar("Variant", bound=Named)


class Registry(Generic[Variant]):
    """All variants of one kind."""

    def __init__(self, key: str, package: str, also: Sequence[str] = ()):
        """
        Args:
            key: The configuration key that takes the name of a variant.
            package: The package with llmtune's own variants; its modules register on import.
            also: Values of the key that name no variant, such as ``none``.
        """
        self.key = key
        self._package = package
        self._also = tuple(also)
        self._variants: dict[str, Variant] = {}

    def register(self, variant: Variant) -> Variant:
        """Register a variant under its name.

        Raises:
            ValueError: Another variant has this name.
        """
        if (
            variant.name in self._also
            or self._variants.setdefault(variant.name, variant) is not variant
        ):
            raise ValueError(f"{self.key}={variant.name}: there is one of this name already")
        return variant

    def list(self) -> dict[str, Variant]:
        """Return all variants by name, sorted.

        Raises:
            ConfigError: A module of ``LLMTUNE_PLUGINS`` cannot be imported.
        """
        _import_modules(self._package)
        _import_plugins(os.environ.get(PLUGINS, ""))
        return dict(sorted(self._variants.items()))

    def find(self, name: str) -> Variant:
        """Return the variant of a name.

        Raises:
            ConfigError: No variant has this name; with the nearest one.
        """
        # Fast, because the data reader asks for every row.
        if (found := self._variants.get(name)) is not None:
            return found
        known = self.list()
        if name in known:
            return known[name]
        names = [*known, *self._also]
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
        raise ConfigError(f"{self.key}={name}: there is no such one; {hint}")


def hash_plugins() -> str:
    """Hash the files of the plug-ins, as a part of cache keys; empty without plug-ins.

    Raises:
        ConfigError: One of them cannot be imported.
    """
    names = os.environ.get(PLUGINS, "")
    _import_plugins(names)
    files = [sys.modules[name].__file__ for name in _split(names)]
    if not files:
        return ""
    return sha256_files(Path(file) for file in files if file)


def _split(names: str) -> list[str]:
    return [text.strip() for text in names.split(",") if text.strip()]


@cache
def _import_modules(package: str) -> None:
    folder = importlib.import_module(package)
    for module in pkgutil.iter_modules(folder.__path__, f"{package}."):
        importlib.import_module(module.name)


@cache
def _import_plugins(names: str) -> None:
    for name in _split(names):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"{PLUGINS} names {name}, which cannot be imported ({error}): install it, or put"
                " its folder on PYTHONPATH"
            ) from error
