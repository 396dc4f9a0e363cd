"""Where ``paths.cache_dir`` lies: in a folder of this user's own, never in one that all share."""

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
    """The folder that the configuration names, whatever it is like.

    Raises:
        MissingPrerequisiteError: None is named, or it is to lie in the home of a user who has none.
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
    """The folder, made where it is missing, to be written to.

    Raises:
        MissingPrerequisiteError: As :func:`locate_cache`; it cannot be made; or it is another's.
    """
    folder = locate_cache(paths)
    make_own(folder, KEY, INSTEAD)
    return folder


def find_cache(paths: PathsConfig) -> Path:
    """The folder for what is only remembered there, and done without where it cannot be made.

    Raises:
        MissingPrerequisiteError: As :func:`locate_cache`, or it is another's.
    """
    folder = locate_cache(paths)
    if folder.is_dir():
        require_own(folder, KEY, INSTEAD)
        return folder
    with contextlib.suppress(MissingPrerequisiteError):
        make_own(folder, KEY, INSTEAD)
    return folder
