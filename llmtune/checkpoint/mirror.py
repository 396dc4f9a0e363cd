"""Copy complete checkpoints to any URL that fsspec writes to, and fetch them back.

Object stores have neither renames nor folders. So a copy counts as complete by its marker alone,
which is written last and removed first, and holds the hash of the manifest it was written for.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llmtune.errors import CheckpointError, LlmtuneError
from llmtune.security.redaction import redact
from llmtune.storage import layout
from llmtune.storage.atomic import ASIDE, make_empty, remove_folder, write_atomically
from llmtune.storage.hashing import hash_stream
from llmtune.storage.manifest import find_damage, is_complete, publish
from llmtune.storage.remote import (
    PermanentCopyError,
    RemoteFolder,
    describe_error,
    list_files,
    marker_of,
    open_source,
    retry,
)


@dataclass(frozen=True, slots=True)
class _Job:
    """A checkpoint that waits to be copied, or is being copied."""

    folder: Path
    keep: frozenset[str] | None
    """Names of the checkpoints that stay at the mirror; None for all."""


class Mirror:
    """Copies complete checkpoints to ``<url>/<run_name>/``, in a thread.

    Training does not wait for it, nor does the end of the process.
    """

    def __init__(self, url: str, run_name: str, say: Callable[[str], None], run_id: str = ""):
        """
        Args:
            say: Shows a line to the user; called from the thread, once per checkpoint that was not
                copied.
            run_id: Marks the mirror as this run's. Nothing is written to or removed from one that
                another run has marked.

        Raises:
            ConfigError: The protocol is unknown, or its driver is not installed.
        """
        self.url = _join(url, run_name)
        self._remote = RemoteFolder(self.url, f"checkpoint.mirror={redact(url)}")
        self._owner = Owner(url, run_name)
        self._run_id = run_id
        self._say = say
        self._changed = threading.Condition()
        self._waiting: list[_Job] = []
        self._current: _Job | None = None
        self._failures: dict[str, str] = {}
        threading.Thread(target=self._run, name="checkpoint-mirror", daemon=True).start()

    def put(self, folder: Path, keep: set[str] | None) -> None:
        """Queue a complete checkpoint; returns at once.

        Args:
            keep: Names of the checkpoints that stay at the mirror once this one is there; None for
                all. Others are also dropped from the queue, so that they can be pruned: a slow
                network must not fill the disk.
        """
        with self._changed:
            self._waiting = [
                job for job in self._waiting if keep is None or job.folder.name in keep
            ]
            self._waiting.append(_Job(folder, None if keep is None else frozenset(keep)))
            self._changed.notify_all()

    @property
    def busy(self) -> set[Path]:
        """Return the folders that are queued or being copied, and must not be removed yet."""
        with self._changed:
            return {job.folder for job in self._open_jobs()}

    def finish(self, timeout_seconds: float) -> list[tuple[str, str]]:
        """Wait for the queue.

        Returns:
            The name of each checkpoint that was not copied, and the reason.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._open_jobs(), timeout_seconds)
            late = {
                job.folder.name: f"not copied within {timeout_seconds:g} s"
                for job in self._open_jobs()
            }
            return list({**self._failures, **late}.items())

    def _open_jobs(self) -> list[_Job]:
        return [self._current, *self._waiting] if self._current else self._waiting

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                job = self._current = self._waiting.pop(0)
            try:
                self._copy_and_prune(job)
            finally:
                with self._changed:
                    self._current = None
                    self._changed.notify_all()

    def _copy_and_prune(self, job: _Job) -> None:
        """Copy a checkpoint, then remove what is not kept at the mirror; nothing is raised."""
        name = job.folder.name
        try:
            self._claim()
            self._copy(job.folder)
        except Exception as error:
            reason = redact(describe_error(error))
            with self._changed:
                self._failures[name] = reason
            self._say(
                f"{name} was not copied to {redact(self.url)}, training continues without the copy:"
                f" {reason}"
            )
            return
        with self._changed:
            self._failures.pop(name, None)
        if job.keep is None:
            return
        try:
            # Only after a complete copy, so that the mirror always has one.
            for _, other in retry(self._remote.list_checkpoints):
                if other != name and other not in job.keep:
                    retry(self._remote.remove, other)
        except Exception as error:
            self._say(
                f"older checkpoints at {redact(self.url)} were not removed:"
                f" {redact(describe_error(error))}"
            )

    def _claim(self) -> None:
        """Mark the mirror as this run's, once."""
        if not self._run_id:
            return
        owner = retry(self._owner.read)
        if owner is None:
            retry(self._owner.write, self._run_id)
        elif owner != self._run_id:
            raise PermanentCopyError(
                "the place belongs to another run; take another run_name= or checkpoint.mirror="
            )
        self._run_id = ""

    def _copy(self, folder: Path) -> None:
        """Upload and verify every file, the marker last, unless this copy is complete already."""
        marker, manifest = (
            _local_bytes(folder / name) for name in (layout.COMPLETE, layout.MANIFEST)
        )
        if marker is None or manifest is None:
            raise PermanentCopyError("skipped, because it was pruned")
        files = list_files(marker, manifest)
        if retry(self._remote.read, f"{folder.name}/{layout.COMPLETE}") == marker:
            return
        if folder.name in (name for _, name in retry(self._remote.list_checkpoints)):
            # It is a copy that was cut off, or another checkpoint of the same step.
            retry(self._remote.remove, folder.name)

        # The files first; the marker, which makes the copy count, comes last.
        for name, entry in files.items():
            retry(
                self._remote.upload,
                partial(open_source, folder / name),
                f"{folder.name}/{name}",
                entry,
            )
        signature = _local_bytes(folder / layout.SIGNATURE)
        signed = [] if signature is None else [(layout.SIGNATURE, signature)]
        for name, data in (*signed, (layout.MANIFEST, manifest), (layout.COMPLETE, marker)):
            open_data = partial(io.BytesIO, data)
            retry(self._remote.upload, open_data, f"{folder.name}/{name}", hash_stream(open_data()))


def owner_file(run_name: str) -> str:
    """Return the name of the file that says which run a mirror's folder belongs to."""
    return f"{run_name}.owner"


class Owner:
    """The mark of the run that a folder at a mirror belongs to.

    It is a file beside the folder, which holds nothing but checkpoints.
    """

    def __init__(self, url: str, run_name: str):
        """
        Raises:
            ConfigError: The protocol is unknown, or its driver is not installed.
        """
        self._remote = RemoteFolder(url.rstrip("/"), f"checkpoint.mirror={redact(url)}")
        self._name = owner_file(run_name)

    def read(self) -> str | None:
        """Read the id of the run; None where there is no mark. Makes one attempt."""
        data = self._remote.read(self._name)
        return data.decode(errors="replace").strip() if data is not None else None

    def write(self, run_id: str) -> None:
        """Write the mark. Makes one attempt."""
        open_data = partial(io.BytesIO, run_id.encode())
        self._remote.upload(open_data, self._name, hash_stream(open_data()))


def read_place(url: str, run_name: str) -> tuple[str | None, list[str]]:
    """Read which run has marked a mirror's folder, and which checkpoints are there.

    Returns:
        The run's id, and the names of the checkpoints, complete or not.

    Raises:
        ConfigError: The protocol is unknown, or its driver is not installed.
        CheckpointError: The mirror cannot be read.
    """
    root = _join(url, run_name)
    with _as_checkpoint_errors(root):
        owner = retry(Owner(url, run_name).read)
        remote = RemoteFolder(root, f"checkpoint.mirror={redact(url)}")
        return owner, [name for _, name in sorted(retry(remote.list_checkpoints))]


def withdraw_copies(url: str, run_name: str, run_id: str, step: int) -> list[str]:
    """Unmark a run's own copies of ``step`` and later ones, so that no start resumes from them.

    Their files are removed with the next copy, which removes what the run folder does not keep.

    Returns:
        The names of the copies.

    Raises:
        ConfigError: The protocol is unknown, or its driver is not installed.
        CheckpointError: The mirror cannot be read or written.
    """
    root = _join(url, run_name)
    remote = RemoteFolder(root, f"checkpoint.mirror={redact(url)}")
    with _as_checkpoint_errors(root):
        if retry(Owner(url, run_name).read) not in (None, run_id):
            return []
        later = [name for at, name in sorted(retry(remote.list_checkpoints)) if at >= step]
        complete = [
            name for name in later if retry(remote.read, f"{name}/{layout.COMPLETE}") is not None
        ]
        for name in complete:
            retry(remote.unmark, name)
    return complete


def find_remote(url: str, run_name: str) -> list[tuple[int, str]]:
    """List the complete checkpoints of a run at a mirror, oldest first.

    Returns:
        Step and URL of each, with the credentials that ``url`` has.

    Raises:
        ConfigError: The protocol is unknown, or its driver is not installed.
        CheckpointError: The mirror cannot be read.
    """
    root = _join(url, run_name)
    remote = RemoteFolder(root, f"checkpoint.mirror={redact(url)}")
    complete = []
    with _as_checkpoint_errors(root):
        for step, name in retry(remote.list_checkpoints):
            marker = retry(remote.read, f"{name}/{layout.COMPLETE}")
            manifest = retry(remote.read, f"{name}/{layout.MANIFEST}") if marker else None
            if manifest is not None and marker == marker_of(manifest):
                complete.append((step, _join(root, name)))
    return sorted(complete)


def read_remote(checkpoint_url: str, name: str) -> bytes | None:
    """Read a small file of a checkpoint at a mirror; None where there is none.

    Raises:
        ConfigError: The protocol is unknown, or its driver is not installed.
        CheckpointError: The mirror cannot be read.
    """
    remote = RemoteFolder(checkpoint_url.rstrip("/"), redact(checkpoint_url))
    with _as_checkpoint_errors(checkpoint_url):
        return retry(remote.read, name)


def fetch_remote(checkpoint_url: str, run: Path) -> Path:
    """Download a complete checkpoint into ``run``, where it appears verified or not at all.

    Returns:
        The folder, which may have been there already.

    Raises:
        ConfigError: The protocol is unknown, or its driver is not installed.
        CheckpointError: It is incomplete, damaged or unsafe, cannot be read, or ``run`` has another
            one of this step.
    """
    shown = redact(checkpoint_url)
    match = re.search(r"checkpoint-(\d+)/*$", checkpoint_url)
    if match is None:
        raise CheckpointError(f"{shown}: the URL of a checkpoint ends in checkpoint-<step>")
    folder = layout.checkpoint_folder(run, int(match[1]))
    remote = RemoteFolder(checkpoint_url.rstrip("/"), shown)
    # Marker and manifest first: what the checkpoint is, and which files it has.
    with _as_checkpoint_errors(checkpoint_url):
        marker, manifest = (retry(remote.read, name) for name in (layout.COMPLETE, layout.MANIFEST))
        if marker is None or manifest is None:
            raise PermanentCopyError(
                f"no complete checkpoint is there (no {layout.COMPLETE} or no {layout.MANIFEST})"
            )
        files = list_files(marker, manifest)
    # The same checkpoint may be here already.
    if is_complete(folder):
        if marker != _local_bytes(folder / layout.COMPLETE) and manifest != _local_bytes(
            folder / layout.MANIFEST
        ):
            raise CheckpointError(
                f"{folder} is another checkpoint than {shown}; move it away to fetch that one, "
                f"or resume from it with resume_from_checkpoint={folder}"
            )
        if not find_damage(folder):
            return folder
    # All files aside, each verified.
    aside = folder.with_name(f"{folder.name}.fetch{ASIDE}")
    try:
        with _as_checkpoint_errors(checkpoint_url):
            make_empty(aside)
            for name, entry in files.items():
                retry(remote.download, name, aside / name, entry)
            signature = retry(remote.read, layout.SIGNATURE)
            for name, data in ((layout.MANIFEST, manifest), (layout.SIGNATURE, signature)):
                if data is not None:
                    write_atomically(aside / name, data)
            # What is there is incomplete, or a damaged copy of this very checkpoint.
            publish(aside, folder)
    finally:
        remove_folder(aside)
    return folder


@contextmanager
def _as_checkpoint_errors(url: str) -> Iterator[None]:
    """Turn whatever goes wrong into an error that a user can act on."""
    try:
        yield
    except LlmtuneError:
        raise
    except PermanentCopyError as error:
        raise CheckpointError(
            f"{redact(url)}: {error}; take another checkpoint of this mirror"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"{redact(url)} was not read: {redact(describe_error(error))}. Nothing was changed"
            " here; check the network, the credentials and the free disk space, then run the same"
            " command again"
        ) from error


def _local_bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _join(url: str, name: str) -> str:
    return url + name if url.endswith("/") else f"{url}/{name}"
