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
import traceback
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

    def __init__(
        self,
        key: str,
        package: str,
        also: Sequence[str] = (),
        interface: type[Variant] | None = None,
    ):
        """Args:
        key: The configuration key that takes the name of a variant.
        package: The package with llmtune's own variants; its modules register on import.
        also: Values of the key that name no variant, such as ``none``.
        interface: The class of the variants, with an annotation for each attribute.
        """
        self.key = key
        self._package = package
        self._interface = interface
        self._also = tuple(also)
        self._variants: dict[str, Variant] = {}
        self._modules: dict[str, str] = {}

    def register(self, variant: Variant) -> Variant:
        """Register a variant under its name.

        Raises:
            TypeError: It is no complete variant of this kind.
            ConfigError: Another variant has this name.
        """
        if self._interface is not None:
            _check_interface(variant, self._interface)
        name, module = variant.name, str(sys._getframe(1).f_globals.get("__name__"))
        if name in self._also or self._variants.setdefault(name, variant) is not variant:
            raise ConfigError(
                f"{self.key}={name} of {module}: there is one of this name already, of"
                f" {self._modules.get(name, 'llmtune')}; give yours another name"
            )
        self._modules[name] = module
        return variant

    def list(self) -> dict[str, Variant]:
        """Return all variants by name, sorted.

        Raises:
            ConfigError: The import of a module of ``LLMTUNE_PLUGINS`` fails.
        """
        _import_modules(self._package)
        _import_plugins(os.environ.get(PLUGINS, ""))
        return dict(sorted(self._variants.items()))

    def names(self) -> Sequence[str]:
        """Return every value that the key takes.

        Raises:
            As :meth:`list`.
        """
        return (*self.list(), *self._also)

    def find(self, name: str) -> Variant:
        """Return the variant of a name.

        Raises:
            ConfigError: No variant has this name; with the reason, or the nearest one.
        """
        # Fast, because the data reader asks for every row.
        if (found := self._variants.get(name)) is not None:
            return found
        known = self.list()
        if name in known:
            return known[name]
        # Only for the message: it brings the library that composes.
        from llmtune.config.foreign import ABSENT_OPTIONS

        group = self.key.partition(".")[0]
        if (reason := ABSENT_OPTIONS.get(group, {}).get(name)) is not None:
            raise ConfigError(f"{self.key}={name}: there is no such one: {reason}")
        names = self.names()
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
        if not close and not os.environ.get(PLUGINS):
            hint += f"; the module of one of your own is named in {PLUGINS}"
        raise ConfigError(f"{self.key}={name}: there is no such one; {hint}")

    def hash_plugins(self) -> str:
        """Hash the files outside llmtune that register variants; empty where there are none.

        Raises:
            ConfigError: The import of a module of ``LLMTUNE_PLUGINS`` fails.
        """
        self.list()
        modules = {name for name in self._modules.values() if name.split(".")[0] != "llmtune"}
        files = [getattr(sys.modules.get(name), "__file__", None) for name in sorted(modules)]
        return sha256_files(Path(file) for file in files if file) if any(files) else ""


def hash_plugins() -> str:
    """Hash the files of the plug-ins, as a part of cache keys; empty without plug-ins.

    Raises:
        ConfigError: The import of one of them fails.
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
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"{PLUGINS} names {name}, {_describe_failure(name, error)}"
            ) from error


def _describe_failure(name: str, error: BaseException) -> str:
    """Say why the import of a plug-in fails, and what to do."""
    if (
        isinstance(error, ModuleNotFoundError)
        and error.name
        and f"{name}.".startswith(f"{error.name}.")
    ):
        if "/" in name or name.endswith(".py"):
            return "which is a path: write the module's name, such as my.module"
        return f"which cannot be imported ({error}): install it, or put its folder on PYTHONPATH"
    line = _find_line(error)
    place = f" at {line}" if line else ""
    advice = "install what it imports" if isinstance(error, ModuleNotFoundError) else "correct it"
    return f"whose import fails{place} ({type(error).__name__}: {error}): {advice}"


def _find_line(error: BaseException) -> str | None:
    """Find the last line outside llmtune and Python's own import that led to an error."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    own = str(Path(__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((own, "<")) and frame.filename != importlib.__file__:
            return f"{frame.filename}:{frame.lineno}"
    return None


def describe_plugin_error(error: BaseException) -> str | None:
    """Describe an unexpected error that was raised in a plug-in, or in what one called.

    Returns:
        None where no line of a plug-in is in the traceback.
    """
    files = {
        # All files of a plug-in that is a package.
        str(file).removesuffix("__init__.py"): name
        for name in _split(os.environ.get(PLUGINS, ""))
        if (file := getattr(sys.modules.get(name), "__file__", None))
    }
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        for name in (name for file, name in files.items() if frame.filename.startswith(file)):
            return (
                f"the plug-in {name} fails at {frame.filename}:{frame.lineno}"
                f" ({type(error).__name__}: {error}): correct that line, or what calls it, and"
                " run the same command again (debug=trace shows the traceback)"
            )
    return None


def _check_interface(variant: object, interface: type) -> None:
    """Check that a variant is an instance with all attributes, which functions can be called."""
    if not isinstance(variant, interface):
        kind = variant if isinstance(variant, type) else type(variant)
        which = "the class" if isinstance(variant, type) else "a"
        text = f"register an instance of {interface.__name__}, not {which} {kind.__name__}"
        raise TypeError(text)
    for name, annotation in interface.__annotations__.items():
        if not hasattr(variant, name):
            raise TypeError(f"{type(variant).__name__} has no {name}")
        value = getattr(variant, name)
        if str(annotation).startswith("Callable") and value is not None and not callable(value):
            raise TypeError(f"{name} must be a function, not {value!r}")
