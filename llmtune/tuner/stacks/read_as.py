"""Let a module read another value in place of one of its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def read_as(module: Any, name: str, value: Any) -> Iterator[None]:
    """Let a module read another value under the name of one of its parameters, during a block."""
    # Python finds an attribute of the object before ``nn.Module`` looks among the parameters, which
    # keep their place for ZeRO's hooks.
    module.__dict__[name] = value
    try:
        yield
    finally:
        del module.__dict__[name]
