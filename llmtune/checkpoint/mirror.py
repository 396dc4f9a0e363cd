"""Copies of complete checkpoints at any URL that fsspec writes to, and the way back.

Object stores know neither renames nor folders: a copy is complete by its marker alone, which is written last and removed
first, and which holds the hash of the manifest that it was written for.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import fsspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from llmtune.checkpoint import names
from llmtune.checkpoint.find import is_complete
from llmtune.checkpoint.manifest import find_damage, flush, publish
from llmtune.errors import CheckpointError, ConfigError, LlmtuneError
from llmtune.secrets import redact

T = TypeVar("T")

#: How often a file is tried, and the wait after the first failure, which doubles each time.
ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0

_BLOCK_BYTES = 1 << 22

#: Protocol -> package with its driver.
_DRIVERS = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    "oss": "ossfs",
}


class _UnfitError(Exception):
    """What is to be copied is not there, or not as its manifest says: trying again does not help."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A checkpoint on its way."""

    folder: Path
    keep: frozenset[str]


class Mirror:
    """Copies complete checkpoints to ``<url>/<run_name>/`` in a thread, which neither training nor the exit waits for."""

    def __init__(self, url: str, run_name: str, say: Callable[[str], None]):
        """
        Args:
            say: Takes a line for the user; called from the thread, once for a checkpoint that was not copied.

        Raises:
            ConfigError: The protocol is unknown, or its driver is not installed.
        """
        self.url = _join(url, run_name)
        self._store = _Store(self.url, f"checkpoint.mirror={redact(url)}")
        self._say = say
        self._changed = threading.Condition()
        self._waiting: list[_Job] = []
        self._current: _Job | None = None
        self._failures: dict[str, str] = {}
        threading.Thread(target=self._run, name="checkpoint-mirror", daemon=True).start()

    def put(self, folder: Path, keep: set[str]) -> None:
        """Queue a complete checkpoint; returns at once.

        Args:
            keep: Names of the checkpoints that stay at the mirror once this one is there. Those that wait in the queue
                and are not among them are dropped from it, so that a slow network does not make the disk fill.
        """
        with self._changed:
            self._waiting = [job for job in self._waiting if job.folder.name in keep]
            self._waiting.append(_Job(folder, frozenset(keep)))
            self._changed.notify_all()

    @property
    def busy(self) -> set[Path]:
        """Folders queued or being copied: not to be removed yet."""
        with self._changed:
            return {job.folder for job in self._open_jobs()}

    def finish(self, timeout_seconds: float) -> list[tuple[str, str]]:
        """Wait for the queue; the checkpoints that did not make it, each with the reason."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open_jobs(), timeout_seconds)
            late = {job.folder.name: f"not copied within {timeout_seconds:g} s" for job in self._open_jobs()}
            return list({**self._failures, **late}.items())

    def _open_jobs(self) -> list[_Job]:
        return [self._current, *self._waiting] if self._current else self._waiting

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                job = self._current = self._waiting.pop(0)
            try:
                self._deliver(job)
            finally:
                with self._changed:
                    self._current = None
                    self._changed.notify_all()

    def _deliver(self, job: _Job) -> None:
        """Copy, then let go at the mirror what is not kept; nothing is raised."""
        name = job.folder.name
        try:
            self._copy(job.folder)
        except Exception as error:
            reason = redact(_describe(error))
            with self._changed:
                self._failures[name] = reason
            self._say(f"{name} was not copied to {redact(self.url)}, training goes on without the copy: {reason}")
            return
        with self._changed:
            self._failures.pop(name, None)
        try:
            for _, other in _persist(self._store.list_checkpoints):
                if other != name and other not in job.keep:
                    _persist(self._store.remove, other)
        except Exception as error:
            self._say(f"older checkpoints at {redact(self.url)} were not removed: {redact(_describe(error))}")

    def _copy(self, folder: Path) -> None:
        """Upload and verify every file, the marker last; nothing where the same copy is complete already."""
        marker, manifest = (_local_bytes(folder / name) for name in (names.COMPLETE, names.MANIFEST))
        if marker is None or manifest is None:
            raise _UnfitError("skipped, because it was pruned")
        files = _list_files(marker, manifest)
        if _persist(self._store.read, f"{folder.name}/{names.COMPLETE}") == marker:
            return
        if folder.name in (name for _, name in _persist(self._store.list_checkpoints)):
            # A copy that was cut off, or another checkpoint of the same step.
            _persist(self._store.remove, folder.name)
        for name, entry in files.items():
            _persist(self._store.upload, partial(_open_source, folder / name), f"{folder.name}/{name}", entry)
        for name, data in ((names.MANIFEST, manifest), (names.COMPLETE, marker)):
            open_data = partial(io.BytesIO, data)
            _persist(self._store.upload, open_data, f"{folder.name}/{name}", _hash(open_data()))


def find_remote(url: str, run_name: str) -> list[tuple[int, str]]:
    """Complete checkpoints of a run at a mirror, oldest first: step and URL (with the credentials that ``url`` has).

    Raises:
        ConfigError: The protocol is unknown, or its driver is not installed.
        CheckpointError: The mirror cannot be read.
    """
    root = _join(url, run_name)
    store = _Store(root, f"checkpoint.mirror={redact(url)}")
    found = []
    with _reported(root):
        for step, name in _persist(store.list_checkpoints):
            marker = _persist(store.read, f"{name}/{names.COMPLETE}")
            manifest = _persist(store.read, f"{name}/{names.MANIFEST}") if marker else None
            if manifest is not None and marker == _hash_text(manifest):
                found.append((step, _join(root, name)))
    return sorted(found)


def fetch_remote(checkpoint_url: str, run: Path) -> Path:
    """Download a complete checkpoint into ``run``; it appears there whole and verified, or not at all.

    Raises:
        ConfigError: The protocol is unknown, or its driver is not installed.
        CheckpointError: It is incomplete, damaged or unsafe, cannot be read, or ``run`` has another one of this step.
    """
    shown = redact(checkpoint_url)
    match = re.search(r"checkpoint-(\d+)/*$", checkpoint_url)
    if match is None:
        raise CheckpointError(f"{shown}: the URL of a checkpoint ends in checkpoint-<step>")
    folder = names.checkpoint_folder(run, int(match[1]))
    store = _Store(checkpoint_url.rstrip("/"), shown)
    with _reported(checkpoint_url):
        marker, manifest = (_persist(store.read, name) for name in (names.COMPLETE, names.MANIFEST))
        if marker is None or manifest is None:
            raise _UnfitError(f"no complete checkpoint is there (no {names.COMPLETE} or no {names.MANIFEST})")
        files = _list_files(marker, manifest)
    if is_complete(folder):
        if marker != _local_bytes(folder / names.COMPLETE) and manifest != _local_bytes(folder / names.MANIFEST):
            raise CheckpointError(
                f"{folder} is another checkpoint than {shown}; move it away to fetch that one, "
                f"or go on from it with resume_from_checkpoint={folder}"
            )
        if not find_damage(folder):
            return folder
    aside = folder.with_name(folder.name + ".fetch.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with _reported(checkpoint_url):
            aside.mkdir(parents=True)
            for name, entry in files.items():
                _persist(store.download, name, aside / name, entry)
            (aside / names.MANIFEST).write_bytes(manifest)
            flush(aside / names.MANIFEST)
            # Either incomplete, or a damaged copy of this very checkpoint.
            (folder / names.COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            publish(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


class _Store:
    """One place at a URL; paths are relative to it. Every method does one attempt."""

    def __init__(self, url: str, label: str):
        """
        Args:
            label: What an error names: the key and the URL without credentials.
        """
        protocol = url.split("::")[-1].partition("://")[0]
        package = _DRIVERS.get(protocol)
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{label}: the driver of {protocol}:// is not installed: pip install {package}")
        try:
            self._driver, self._root = fsspec.url_to_fs(url)
        except Exception as error:
            # Drivers raise classes of their own, here and in all that follows.
            raise ConfigError(f"{label}: cannot be used: {redact(_describe(error))}") from error

    @property
    def _system(self) -> Any:
        """The driver, made to forget its listings: others write there too."""
        self._driver.invalidate_cache()
        return self._driver

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def read(self, name: str) -> bytes | None:
        """A small file; None where there is none. ``exists`` of fsspec takes a failing network for that, too."""
        try:
            return bytes(self._system.cat_file(self._at(name)))
        except FileNotFoundError:
            return None

    def upload(self, open_source: Callable[[], BinaryIO], name: str, entry: dict[str, Any]) -> None:
        """Write a file and read it back.

        Raises:
            _UnfitError: The source is not there, or not as ``entry`` says.
        """
        path = self._at(name)
        with open_source() as source, self._create(path) as target:
            sent = _hash(source, target)
        if sent != entry:
            raise _UnfitError(f"{name} is damaged on the local disk: not the size and hash of its manifest")
        if isinstance(self._driver, LocalFileSystem):
            flush(Path(path))
            flush(Path(path).parent)
        with self._system.open(path, "rb") as file:
            if _hash(file) != entry:
                raise OSError(f"{name} reads back with other contents than it was written with")

    def download(self, name: str, target: Path, entry: dict[str, Any]) -> None:
        """Write a file to the local disk, verified and flushed."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._system.open(self._at(name), "rb") as source, target.open("wb") as file:
            received = _hash(source, file)
        if received != entry:
            raise OSError(f"{name} arrives with other contents than its manifest says")
        flush(target)
        flush(target.parent)

    def list_checkpoints(self) -> list[tuple[int, str]]:
        """Steps and names of checkpoints, complete or not."""
        try:
            paths = self._system.ls(self._root, detail=False)
        except FileNotFoundError:
            return []
        found = ((names.checkpoint_step(Path(path)), Path(path).name) for path in paths)
        return [(step, name) for step, name in found if step is not None]

    def remove(self, name: str) -> None:
        """Remove what lies under a name, the marker first, so that it is never half-gone with its marker."""
        with suppress(FileNotFoundError):
            self._system.rm_file(self._at(f"{name}/{names.COMPLETE}"))
        with suppress(FileNotFoundError):
            self._system.rm(self._at(name), recursive=True)

    def _create(self, path: str) -> Any:
        try:
            return self._system.open(path, "wb")
        except FileNotFoundError:
            # Only systems with real folders ask for the folder first.
            self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
            return self._system.open(path, "wb")


def _list_files(marker: bytes, manifest: bytes) -> dict[str, dict[str, Any]]:
    """Files with size and hash, once the manifest is known to be the marker's and to name nothing outside its folder."""
    if marker != _hash_text(manifest):
        raise _UnfitError(f"{names.MANIFEST} is not the one that {names.COMPLETE} was written for")
    try:
        listed = json.loads(manifest)["files"].items()
        files = {name: {"size": entry["size"], "xxh3_128": entry["xxh3_128"]} for name, entry in listed}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _UnfitError(f"{names.MANIFEST} cannot be read ({_describe(error)})") from error
    for name in files:
        path = PurePosixPath(name)
        inside = name == path.as_posix() != "." and not path.is_absolute() and ".." not in path.parts
        if not inside or "\0" in name or name in (names.MANIFEST, names.COMPLETE):
            raise _UnfitError(f"{names.MANIFEST} lists {name!r}, which is no file of a checkpoint")
    return files


def _persist(act: Callable[..., T], *arguments: Any) -> T:
    """Try several times, unless it cannot help."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return act(*arguments)
        except _UnfitError:
            raise
        except Exception:
            time.sleep(FIRST_WAIT_SECONDS * 2**attempt)
    return act(*arguments)


@contextmanager
def _reported(url: str) -> Iterator[None]:
    """Whatever goes wrong becomes an error that a user can act on."""
    try:
        yield
    except LlmtuneError:
        raise
    except _UnfitError as error:
        raise CheckpointError(f"{redact(url)}: {error}; take another checkpoint of this mirror") from error
    except Exception as error:
        raise CheckpointError(
            f"{redact(url)} was not read: {redact(_describe(error))}. Nothing was changed here; check the network, "
            "the credentials and the free disk space, then run the same command again"
        ) from error


def _open_source(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise _UnfitError("skipped, because it was pruned") from error


def _local_bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _hash(source: BinaryIO, target: BinaryIO | None = None) -> dict[str, Any]:
    """Size and xxh3-128 of what is read, as a manifest has them, and copied on the way."""
    digest, size = xxhash.xxh3_128(), 0
    while block := source.read(_BLOCK_BYTES):
        digest.update(block)
        size += len(block)
        if target is not None:
            target.write(block)
    return {"size": size, "xxh3_128": digest.hexdigest()}


def _hash_text(manifest: bytes) -> bytes:
    return xxhash.xxh3_128(manifest).hexdigest().encode()


def _join(url: str, name: str) -> str:
    return url + name if url.endswith("/") else f"{url}/{name}"


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, _UnfitError) else f"{type(error).__name__}: {error}"
