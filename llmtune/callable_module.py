"""Packages that can be called, since a verb of the Python API has the name of a room.

``llmtune.plan`` is the package ``llmtune/plan/``, whose modules are imported from everywhere, and
``llmtune.plan("model=tiny")`` is what the verb ``plan`` does. Python lets a module have a class of
its own: https://docs.python.org/3/reference/datamodel.html#customizing-module-attribute-access.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """The package ``llmtune.NAME``, which calls the function ``NAME`` of ``llmtune.api.NAME``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function of the API."""
        name = self.__name__.rpartition(".")[2]
        function = getattr(importlib.import_module(f"llmtune.api.{name}"), name)
        return function(*args, **kwargs)
