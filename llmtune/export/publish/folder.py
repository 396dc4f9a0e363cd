"""Write an export aside, describe it, and give it its name in one rename.

A killed export is continued: finished files wait aside, listed in a journal. What failed leaves
nothing.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from llmtune.errors import ExportError, LlmtuneError
from llmtune.export.publish.shards import Journal
from llmtune.security.trust import require_own
from llmtune.storage import layout
from llmtune.storage.atomic import (
    aside_path,
    flush,
    remove_folder,
    remove_parts,
    replace_folder,
    replaced_path,
    restore_replaced,
)
from llmtune.storage.hashing import hash_file
from llmtune.storage.lock import try_lock
from llmtune.storage.manifest import is_complete, mark_complete, write_manifest
from llmtune.storage.plain_json import parse_json
from llmtune.storage.signature import Signer
from llmtune.units import format_bytes


def write_export(
    folder: Path,
    job: str,
    write: Callable[[Path, Journal], None],
    about: dict[str, Any],
    signer: Signer | None = None,
) -> None:
    """Call ``write`` on a folder beside ``folder``, add the manifest, and publish it.

    Args:
        job: Says what is written from what; the rest of another job that was killed is not
            used.

    Raises:
        ExportError: The folder exists and is not an export, another export is writing it, or the
            disk refuses.
    """
    restore_export(folder)
    if folder.is_dir() and any(folder.iterdir()) and not _is_export(folder):
        raise ExportError(
            f"{folder} exists and is not an export of llmtune; take another output_dir="
        )
    aside = aside_path(folder)
    try:
        aside.mkdir(parents=True, exist_ok=True)
        # Its name can be guessed, and in a folder that all share another may have made it, with
        # links in it to be written over.
        require_own(aside, "output_dir", "take another output_dir=", ExportError)
        with _locked(aside):
            try:
                _write(aside, job, write, partial(write_manifest, about=about, signer=signer))
                replace_folder(aside, folder, is_complete)
            except (OSError, LlmtuneError):
                remove_folder(aside)
                raise
    except OSError as error:
        raise ExportError(f"{folder} was not written: {error}") from error


def check_replaceable(folder: Path, wanted: str) -> None:
    """Refuse to replace an export of another format than ``wanted``.

    Raises:
        ExportError: ``folder`` is such an export.
    """
    if not _is_export(folder):
        return
    there = parse_json((folder / layout.MANIFEST).read_text()).get("format")
    if there is not None and there != wanted:
        raise ExportError(
            f"{folder} holds another export (export={there}, and this is export={wanted}), which is"
            " not removed: take another output_dir=, or remove it"
        )


def check_room(folder: Path, needed_bytes: int) -> None:
    """Check that the disk of ``folder`` has room for ``needed_bytes``.

    What a killed start left there counts as room.

    Raises:
        ExportError: It has not.
    """
    used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free + used
    if free < needed_bytes:
        raise ExportError(
            f"{folder.parent} has {format_bytes(free)} free, the export needs"
            f" {format_bytes(needed_bytes)}; take an output_dir= on a larger disk"
        )


def _write(
    aside: Path,
    job: str,
    write: Callable[[Path, Journal], None],
    describe: Callable[[Path, dict[str, dict[str, Any]]], None],
) -> None:
    journal = Journal(aside, job)
    write(aside, journal)
    remove_parts(aside)
    files = {}
    own = (journal.path, aside / layout.MANIFEST, aside / layout.SIGNATURE)
    for file in sorted(file for file in aside.rglob("*") if file.is_file() and file not in own):
        name = file.relative_to(aside).as_posix()
        if name not in journal.entries:
            flush(file)
        files[name] = journal.entries.get(name) or hash_file(file)
    describe(aside, files)
    journal.close()
    mark_complete(aside)


def restore_export(folder: Path) -> None:
    """Give an old export its name back whose replacement was cut off; remove a replaced one."""
    restore_replaced(folder, is_complete)
    remove_folder(replaced_path(folder))


@contextlib.contextmanager
def _locked(aside: Path) -> Iterator[None]:
    """Allow one export at a time; the lock ends with the process that holds it."""
    descriptor = os.open(aside, os.O_RDONLY)
    try:
        if not try_lock(descriptor):
            raise ExportError(
                f"another export is writing {aside}; wait for it, or take another output_dir="
            )
        yield
    finally:
        os.close(descriptor)


def _is_export(folder: Path) -> bool:
    """Tell whether a folder is an export.

    Only an export's manifest names a format; checkpoints and trained models have manifests too.
    """
    try:
        return is_complete(folder) and "format" in parse_json(
            (folder / layout.MANIFEST).read_text()
        )
    except (OSError, json.JSONDecodeError):
        return False
