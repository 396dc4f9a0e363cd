"""Copy files to and from any URL that fsspec writes to, verified; and retry what fails."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from llmtune.errors import ConfigError
from llmtune.security.redaction import redact
from llmtune.storage import layout
from llmtune.storage.atomic import flush
from llmtune.storage.hashing import hash_bytes, hash_stream
from llmtune.storage.plain_json import parse_json

T = TypeVar("T")

#: Attempts per file, and the wait after the first failed one, which doubles each time.
ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0

#: Protocol -> package with its driver.
DRIVERS = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    "oss": "ossfs",
}


def check_protocol(url: str, key: str) -> None:
    """Refuse a URL of a protocol that fsspec does not know. Neither driver nor network is used.

    Raises:
        ConfigError: Its protocol is unknown.
    """
    protocol = url.split("::")[-1].partition("://")[0]
    # Protocols that fsspec knows by itself, and those that a program has registered.
    if "://" in url and protocol not in {*fsspec.available_protocols(), *fsspec.registry}:
        raise ConfigError(
            f"{key}={redact(url)}: {protocol}:// is not known; take a URL of fsspec such as"
            " s3://bucket/folder, or a folder"
        )


class PermanentCopyError(Exception):
    """The source is missing or does not match its manifest; retrying cannot help."""


class RemoteFolder:
    """A folder at a URL; names are relative to it. Every method makes one attempt."""

    def __init__(self, url: str, label: str):
        """
        Args:
            label: Names the URL in errors: the key, and the URL without credentials.

        Raises:
            ConfigError: The protocol is unknown, or its driver is not installed.
        """
        protocol = url.split("::")[-1].partition("://")[0]
        package = DRIVERS.get(protocol)
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{label}: the driver of {protocol}:// is not installed: pip install {package}"
            )
        try:
            self._driver, self.root = fsspec.url_to_fs(url)
        except Exception as error:
            # Drivers raise their own classes, here and in all methods.
            raise ConfigError(
                f"{label}: cannot be used: {redact(describe_error(error))}"
            ) from error

    @property
    def system(self) -> Any:
        """Return the driver without cached listings: other processes write there too."""
        self._driver.invalidate_cache()
        return self._driver

    def at(self, name: str) -> str:
        """Return the driver's path of a name."""
        return f"{self.root}/{name}"

    def read(self, name: str) -> bytes | None:
        """Read a small file; None where there is none."""
        # fsspec's exists() also says no where the network fails.
        try:
            return bytes(self.system.cat_file(self.at(name)))
        except FileNotFoundError:
            return None

    def upload(self, open_source: Callable[[], BinaryIO], name: str, entry: dict[str, Any]) -> None:
        """Write a file, read it back and compare.

        Args:
            entry: Size and hash of the file, from its manifest.

        Raises:
            PermanentCopyError: The source is missing, or does not match ``entry``.
            OSError: What was read back does not match.
        """
        path = self.at(name)
        with open_source() as source, self._create(path) as target:
            sent = hash_stream(source, target)
        if sent != entry:
            raise PermanentCopyError(
                f"{name} is damaged on the local disk: not the size and hash of its manifest"
            )
        if isinstance(self._driver, LocalFileSystem):
            flush(Path(path))
            flush(Path(path).parent)
        with self.system.open(path, "rb") as file:
            if hash_stream(file) != entry:
                raise OSError(f"{name} reads back with other contents than it was written with")

    def download(self, name: str, target: Path, entry: dict[str, Any]) -> None:
        """Write a file to the local disk, verified and flushed.

        Raises:
            OSError: What arrived does not match ``entry``.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with self.system.open(self.at(name), "rb") as source, target.open("wb") as file:
            received = hash_stream(source, file)
        if received != entry:
            raise OSError(f"{name} arrives with other contents than its manifest says")
        flush(target)
        flush(target.parent)

    def list_checkpoints(self) -> list[tuple[int, str]]:
        """List steps and names of the checkpoints there, complete or not."""
        try:
            paths = self.system.ls(self.root, detail=False)
        except FileNotFoundError:
            return []
        names = [Path(path).name for path in paths]
        steps = [(layout.checkpoint_step(Path(name)), name) for name in names]
        return [(step, name) for step, name in steps if step is not None]

    def unmark(self, name: str) -> None:
        """Remove the marker of a checkpoint, which is incomplete from then on."""
        with suppress(FileNotFoundError):
            self.system.rm_file(self.at(f"{name}/{layout.COMPLETE}"))

    def remove(self, name: str) -> None:
        """Remove a checkpoint, its marker first, so that none is half-gone and marked complete."""
        self.unmark(name)
        with suppress(FileNotFoundError):
            self._remove_all(self.at(name))

    def _remove_all(self, folder: str) -> None:
        # File by file: fsspec's rm takes a name with *, ? or [ for a pattern, and would remove
        # other runs with it.
        if isinstance(self._driver, LocalFileSystem):
            self._driver.rm(folder, recursive=True)
            return
        entries = self.system.find(folder, withdirs=True, detail=True)
        folders = {path for path, entry in entries.items() if entry["type"] == "directory"}
        folders.add(folder)
        for path in entries.keys() - folders:
            with suppress(FileNotFoundError):
                self._driver.rm_file(path)
        for path in sorted(folders, reverse=True):
            # Object stores have no folders.
            with suppress(OSError, ValueError, NotImplementedError):
                self._driver.rmdir(path)

    def _create(self, path: str) -> Any:
        try:
            return self.system.open(path, "wb")
        except FileNotFoundError:
            # Only file systems with real folders need the folder first.
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            return self.system.open(path, "wb")


def list_files(marker: bytes, manifest: bytes) -> dict[str, dict[str, Any]]:
    """Parse a manifest into the size and hash of each file, and check it.

    Raises:
        PermanentCopyError: It is not the manifest that the marker was written for, or names a file
            outside its folder.
    """
    if marker != marker_of(manifest):
        raise PermanentCopyError(
            f"{layout.MANIFEST} is not the one that {layout.COMPLETE} was written for"
        )
    try:
        listed = parse_json(manifest)["files"].items()
        files = {
            name: {"size": entry["size"], "xxh3_128": entry["xxh3_128"]} for name, entry in listed
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PermanentCopyError(
            f"{layout.MANIFEST} cannot be read ({describe_error(error)})"
        ) from error
    for name in files:
        path = PurePosixPath(name)
        inside = (
            name == path.as_posix() != "." and not path.is_absolute() and ".." not in path.parts
        )
        if (
            not inside
            or "\0" in name
            or name in (layout.MANIFEST, layout.SIGNATURE, layout.COMPLETE)
        ):
            raise PermanentCopyError(
                f"{layout.MANIFEST} lists {name!r}, which is no file of a checkpoint"
            )
    return files


def retry(act: Callable[..., T], *arguments: Any) -> T:
    """Call ``act`` again where it raises, up to :data:`ATTEMPTS` times in all; waits double.

    Not tenacity: for one policy of eight lines it would be a package more to pin and to trust.

    Raises:
        PermanentCopyError: At once, since trying again cannot help.
        Exception: What the last attempt raised.
    """
    for attempt in range(ATTEMPTS - 1):
        try:
            return act(*arguments)
        except PermanentCopyError:
            raise
        except Exception:
            time.sleep(FIRST_WAIT_SECONDS * 2**attempt)
    return act(*arguments)


def open_source(path: Path) -> BinaryIO:
    """Open a local file to be copied.

    Raises:
        PermanentCopyError: It was removed meanwhile.
    """
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise PermanentCopyError("skipped, because it was pruned") from error


def marker_of(manifest: bytes) -> bytes:
    """Compute what the marker of a folder with this manifest holds."""
    return hash_bytes(manifest).encode()


def describe_error(error: BaseException) -> str:
    """Return an error's class and text."""
    if isinstance(error, PermanentCopyError):
        return str(error)
    return f"{type(error).__name__}: {error}"
