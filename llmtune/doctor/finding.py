"""A finding of ``doctor``, and the fix that several of them have."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The state of one thing that a run needs."""

    what: str
    state: str
    """``ok``, ``note`` (works, but), ``bad`` (stops a run)."""
    message: str
    command: str | None = None
    """The command that fixes it."""
    fix: Callable[[], str | None] | None = None
    """The same as a function, where it is safe to do unasked; it returns why it failed, or None."""


def remove_files(files: list[Path]) -> str | None:
    """Remove files; return why that failed, or None."""
    try:
        for file in files:
            file.unlink()
    except OSError as error:
        return str(error)
    return None
