"""Send a published export to the hub, or to any URL that fsspec writes to.

Files that are there already are not sent again. At a URL, a folder that is being filled has
``UPLOADING`` in it and no ``COMPLETE``, which comes last: an upload that was killed is continued,
and its folder is never taken for whole. On the hub everything goes in one commit.
"""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from llmtune.errors import (
    CheckpointError,
    ConfigError,
    ExportError,
    LlmtuneError,
    MissingPrerequisiteError,
)
from llmtune.export.publish.hub import (
    HUB,
    is_export_manifest,
    parse_hub_url,
    resolve_token,
    upload_to_hub,
)
from llmtune.security.redaction import redact
from llmtune.storage import layout
from llmtune.storage.hashing import hash_stream
from llmtune.storage.manifest import check_undamaged, read_manifest
from llmtune.storage.remote import (
    DRIVERS,
    PermanentCopyError,
    RemoteFolder,
    describe_error,
    list_files,
    marker_of,
    open_source,
    retry,
)
from llmtune.units import format_bytes

#: At a URL while it is filled: a manifest of every file that llmtune has put there.
UPLOADING = "UPLOADING"

Say = Callable[[str], None]


def check_upload(url: str, dry_run: bool = False) -> None:
    """Check what can be known without a network, before hours are spent on an export.

    A dry run needs no token.

    Raises:
        ExportError: No place has this address.
        MissingPrerequisiteError: A package or a token is missing.
    """
    if url.startswith(HUB):
        parse_hub_url(url)
        if not dry_run:
            resolve_token(url)
        return
    shown = f"export.upload={redact(url)}"
    protocol = url.split("::")[-1].partition("://")[0] if "://" in url else "file"
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = DRIVERS.get(protocol)
        how = f"pip install {package}" if package else redact(str(error))
        raise MissingPrerequisiteError(
            f"{shown}: the driver of {protocol}:// is not installed: {how}"
        ) from error
    except ValueError as error:
        raise ExportError(
            f"{shown}: {protocol}:// is not known; take hf://user/name, or a URL of fsspec such as"
            " s3://bucket/folder"
        ) from error
    if not url.partition("://")[2].strip("/") and "://" in url:
        raise ExportError(f"{shown} names no folder; take one below it")


def upload_export(folder: Path, url: str, private: bool, dry_run: bool, say: Say) -> None:
    """Copy a published export to ``url``.

    Args:
        url: ``hf://user/name``, ``hf://user/name@branch``, or any URL of fsspec.
        private: A hub repository that is made for this is private.
        dry_run: Only say what would go; no network is used.
        say: Takes a line for the user.

    Raises:
        ExportError: ``folder`` is damaged, the place holds something else, or was not filled;
            the same command continues.
        MissingPrerequisiteError: A package or a token is missing.
    """
    check_upload(url, dry_run)
    if dry_run:
        _say_plan(folder, url, private, say)
        return
    with _reported(url):
        check_undamaged(folder)
        if url.startswith(HUB):
            retry(partial(upload_to_hub, folder, url, private, say))
        else:
            _upload_to_store(folder, url, say)


def _say_plan(folder: Path, url: str, private: bool, say: Say) -> None:
    where = redact(url)
    if url.startswith(HUB) and private:
        where += " (private, if it has to be made)"
    if not folder.is_dir():
        say(f"would upload to {where}: all of {folder}, once it is written")
        return
    read_manifest(folder)
    sizes = {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in folder.rglob("*")
        if file.is_file()
    }
    say(f"would upload to {where}: {len(sizes)} files, {format_bytes(sum(sizes.values()))}")
    for name, size in sorted(sizes.items()):
        say(f"  {name}  {format_bytes(size)}")


@dataclass(frozen=True, slots=True)
class _Found:
    """The files at a URL."""

    listed: frozenset[str]
    """Files that llmtune put there, finished or not."""
    unfinished: bool


def _upload_to_store(folder: Path, url: str, say: Say) -> None:
    store = _open_store(folder, url)
    marker, manifest = (
        (folder / layout.COMPLETE).read_bytes(),
        (folder / layout.MANIFEST).read_bytes(),
    )
    files = list_files(marker, manifest)

    # What is there, read back, and what an earlier export left.
    found = retry(_look, store)
    missing = [name for name, entry in files.items() if not retry(_holds, store, name, entry)]
    stale = found.listed - files.keys()
    signature = (
        (folder / layout.SIGNATURE).read_bytes() if (folder / layout.SIGNATURE).is_file() else None
    )
    ends = {layout.SIGNATURE: signature, layout.MANIFEST: manifest, layout.COMPLETE: marker}
    if (
        not (found.unfinished or missing or stale)
        and {name: retry(store.read, name) for name in ends} == ends
    ):
        say(f"{redact(url)} holds this export already: {len(files)} files, read back and compared")
        return
    # From here to the end there is no export at the URL.
    listed = {**{name: {"size": 0, "xxh3_128": ""} for name in found.listed}, **files}
    retry(_write, store, UPLOADING, json.dumps({"format": "upload", "files": listed}).encode())
    for name in (layout.COMPLETE, layout.MANIFEST, layout.SIGNATURE, *sorted(stale)):
        retry(_remove, store, name)

    # The files, then signature and manifest; the marker is last.
    for count, name in enumerate(missing, start=1):
        retry(store.upload, partial(open_source, folder / name), name, files[name])
        say(f"uploaded {name}  {format_bytes(files[name]['size'])}  ({count}/{len(missing)})")
    retry(_write, store, layout.MANIFEST, manifest)
    if signature is not None:
        retry(_write, store, layout.SIGNATURE, signature)
    retry(_remove, store, UPLOADING)
    retry(_write, store, layout.COMPLETE, marker)
    there = f", {len(files) - len(missing)} were there" if len(missing) < len(files) else ""
    say(f"uploaded {len(missing)} files to {redact(url)}{there}; all read back and compared")


def _open_store(folder: Path, url: str) -> RemoteFolder:
    store = RemoteFolder(url.rstrip("/"), f"export.upload={redact(url)}")
    if isinstance(store.system, LocalFileSystem):
        place = Path(store.root).resolve()
        if place == folder.resolve() or folder.resolve() in place.parents:
            raise PermanentCopyError(
                f"is inside {folder}, which is what would be copied; take another place"
            )
    return store


def _look(store: RemoteFolder) -> _Found:
    """Raises:
    PermanentCopyError: There are files which are no export of llmtune's.
    """
    try:
        entries = store.system.ls(store.root, detail=True)
    except FileNotFoundError:
        return _Found(frozenset(), False)
    root = store.root.rstrip("/")
    # Object stores may have an empty object in the place of the folder.
    others = [entry for entry in entries if entry["name"].rstrip("/") != root or entry["size"]]
    if not others:
        return _Found(frozenset(), False)
    listed: set[str] = set()
    manifests = [
        text for name in (UPLOADING, layout.MANIFEST) if (text := store.read(name)) is not None
    ]
    exports = [text for text in manifests if is_export_manifest(text)]
    for text in exports:
        listed |= list_files(marker_of(text), text).keys()
    if not exports:
        some = ", ".join(sorted(str(entry["name"]).rpartition("/")[2] for entry in others)[:5])
        raise PermanentCopyError(
            f"holds {some}, which is no export of llmtune; take another place, or empty this one"
        )
    return _Found(frozenset(listed), store.read(UPLOADING) is not None)


def _holds(store: RemoteFolder, name: str, entry: dict[str, Any]) -> bool:
    """Tell whether a file is there with the right size and, read back, the right hash."""
    path = store.at(name)
    try:
        if store.system.info(path)["size"] != entry["size"]:
            return False
        with store.system.open(path, "rb") as file:
            return hash_stream(file) == entry
    except FileNotFoundError:
        return False


def _write(store: RemoteFolder, name: str, data: bytes) -> None:
    store.upload(partial(io.BytesIO, data), name, hash_stream(io.BytesIO(data)))


def _remove(store: RemoteFolder, name: str) -> None:
    with suppress(FileNotFoundError):
        store.system.rm_file(store.at(name))


@contextmanager
def _reported(url: str) -> Iterator[None]:
    shown = f"export.upload={redact(url)}"
    try:
        yield
    except PermanentCopyError as error:
        raise ExportError(redact(f"{shown}: {error}")) from error
    except CheckpointError as error:
        raise ExportError(redact(f"{shown}: nothing was sent: {error}; export again")) from error
    except ConfigError as error:
        raise ExportError(redact(str(error))) from error
    except LlmtuneError:
        raise
    except Exception as error:
        raise ExportError(
            redact(
                f"{shown} was not filled: {describe_error(error)}. The export on this disk is"
                " whole; check the network and "
            )
            + "the credentials, then run the same command again: what is there already is not sent"
            " again"
        ) from error
