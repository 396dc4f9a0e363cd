"""Find ``paths.cache_dir``, a folder of this user alone."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from llmtune.config.groups.paths import PathsConfig
from llmtune.errors import MissingPrerequisiteError
from llmtune.security.trust import make_own, require_own

KEY = "paths.cache_dir"
INSTEAD = "name a folder of your own with LLMTUNE_CACHE or paths.cache_dir="


def locate_cache(paths: PathsConfig) -> Path:
    """Return the folder that the configuration names, unchecked.

    Raises:
        MissingPrerequisiteError: None is named, or it would be in the home of a user without one.
    """
    text = paths.cache_dir
    if not text:
        raise MissingPrerequisiteError(f"{KEY} is empty; {INSTEAD}")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise MissingPrerequisiteError(
            f"{KEY}={text}: HOME is not set, and this user (uid {os.getuid()}) has no home;"
            f" {INSTEAD}"
        ) from error


def open_cache(paths: PathsConfig) -> Path:
    """Return the folder for writing; make it where it is missing.

    Raises:
        MissingPrerequisiteError: As :func:`locate_cache`, or it cannot be made, or it is another
            user's.
    """
    folder = locate_cache(paths)
    make_own(folder, KEY, INSTEAD)
    return folder


def find_cache(paths: PathsConfig) -> Path:
    """Return the folder for optional caching; it may be missing where it cannot be made.

    Raises:
        MissingPrerequisiteError: As :func:`locate_cache`, or it is another user's.
    """
    folder = locate_cache(paths)
    if folder.is_dir():
        require_own(folder, KEY, INSTEAD)
        return folder
    with contextlib.suppress(MissingPrerequisiteError):
        make_own(folder, KEY, INSTEAD)
    return folder
