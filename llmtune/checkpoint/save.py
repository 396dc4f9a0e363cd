"""Save a checkpoint: all ranks write into one folder aside, and rank 0 publishes it.

The training threads copy the tensors, with collectives. After that no rank waits for another: each
writes its files, in a thread if there is memory for the copies, then a report of what it wrote.
Rank 0 waits for the reports, writes the manifest, renames the folder and writes the marker last.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtune.checkpoint.optimizer_files import add_states, load_state_files
from llmtune.checkpoint.trainer_state import TrainerState, read_trainer_state
from llmtune.checkpoint.weight_files import WeightFiles, add_weights
from llmtune.checkpoint.writer import Buffers, CheckpointWriter
from llmtune.engine.distributed import all_reduce_any, gather_objects
from llmtune.engine.optimizer_state import optimizer_steps, read_loss_scale, write_loss_scale
from llmtune.engine.train_module import TrainModule
from llmtune.errors import CheckpointError
from llmtune.storage import layout
from llmtune.storage.atomic import aside_path, make_empty, remove_folder, write_atomically
from llmtune.storage.hashing import hash_file
from llmtune.storage.manifest import publish, write_manifest
from llmtune.storage.signature import Signer
from llmtune.storage.tensors.tensor_checks import find_bad_tensors, find_untrained_adapter

#: Seconds between two checks of rank 0 for the others' reports.
_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequest:
    """One checkpoint that is to be written."""

    folder: Path
    state: TrainerState
    weights: WeightFiles
    model_files: dict[str, bytes]
    """Small files that rank 0 writes: configuration, tokenizer, metrics so far."""
    about: dict[str, Any]
    """Further values of the manifest."""
    signer: Signer | None = None
    """The signer on rank 0, where checkpoints are signed."""
    published: Callable[[Path], None] = lambda _: None
    """Called on rank 0 once the folder is published, in the thread that published it."""


class DiskRefusedError(CheckpointError):
    """A checkpoint was not written: the disk is full, or refuses this user."""


class PendingSave:
    """A save in progress on this rank: the copies are taken, the files are being written.

    Public methods are called from the training thread. :meth:`_write` and :meth:`_publish` run in
    the saving thread, or in the training thread where nothing is saved in the background.
    """

    def __init__(self, module: TrainModule, request: SaveRequest, writer: CheckpointWriter):
        self.folder = request.folder
        self.pause_seconds = 0.0
        """Seconds for which training was stopped."""
        self.seconds = 0.0
        """Seconds until this rank was done; on rank 0, until the folder was published."""
        self._rank = module.rank
        self._request = request
        self._writer = writer
        self._started = time.monotonic()
        self._failure: str | None = None
        self._disk_refused = False
        self._given_up = threading.Event()
        self._thread: threading.Thread | None = None

    def begin_writing(self, background: bool) -> None:
        """Write the files, in a thread or before it returns. Collective."""
        self._writer.wait_for_copies()
        if background:
            self.pause_seconds = time.monotonic() - self._started
            self._thread = threading.Thread(
                target=self._run, name=f"save {self.folder.name}", daemon=True
            )
            self._thread.start()
            return
        self._write()
        if all_reduce_any([self._failure is not None], self._rank)[0]:
            self._given_up.set()
        self._publish_if_first()
        self.pause_seconds = self.seconds

    @property
    def has_ended(self) -> bool:
        """Tell whether this rank has nothing left to do."""
        return self._thread is None or not self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Tell whether this rank failed, so that nothing will be published."""
        return self._failure is not None

    def finish(self) -> None:
        """Wait until all ranks are done. Collective.

        Raises:
            DiskRefusedError: On every rank, when any rank could not write; nothing is published
                then.
            CheckpointError: On every rank, when what any rank wrote is unusable.
        """
        # Until every rank has ended: a failed one tells rank 0, which waits for reports.
        while True:
            failed, writing = all_reduce_any([self.has_failed, not self.has_ended], self._rank)
            if failed:
                # A report may never come.
                self._given_up.set()
            if not writing:
                break
            time.sleep(_POLL_SECONDS)
        # The same error on every rank, with the reasons of all.
        outcomes = gather_objects((self._failure, self._disk_refused), self._rank)
        failures = [(text, refused) for text, refused in outcomes if text]
        if failures:
            if self._rank.is_first:
                # Half a checkpoint is of no use, and a full disk needs the room.
                remove_folder(aside_path(self.folder))
            kind = DiskRefusedError if any(refused for _, refused in failures) else CheckpointError
            reasons = "; ".join(dict.fromkeys(text for text, _ in failures))
            raise kind(
                f"{self.folder.name} was not saved ({reasons}). Nothing was published, and earlier"
                " checkpoints are unchanged; fix the cause, and the same command resumes from the"
                " newest"
            )

    def _run(self) -> None:
        self._write()
        self._publish_if_first()

    def _write(self) -> None:
        """Write this rank's files, check them, and write its report."""
        aside = aside_path(self.folder)
        with self._recorded():
            # Without this rank's report nothing is published.
            self._writer.write(self._rank.phases.beat)
            problems = self._find_faults(aside)
            if problems:
                more = " ..." if len(problems) > 3 else ""
                self._failure = f"rank {self._rank.rank}: {'; '.join(problems[:3])}{more}"
                return
            report = {"files": self._writer.entries, "tensors": _describe(self._writer)}
            write_atomically(aside / _report_name(self._rank.rank), json.dumps(report).encode())

    def _publish_if_first(self) -> None:
        if self._rank.is_first:
            with self._recorded():
                self._publish(aside_path(self.folder))
        self.seconds = time.monotonic() - self._started

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep an error for :meth:`finish`: nobody sees the exception of a thread."""
        try:
            yield
        except Exception as error:
            self._disk_refused = isinstance(error, OSError)
            self._failure = self._failure or f"rank {self._rank.rank}: {error}"

    def _find_faults(self, aside: Path) -> list[str]:
        """Read the written weights again, and find numbers that are not finite."""
        problems = []
        for name in self._writer.files:
            if layout.is_state_file(name):
                continue
            problems += find_bad_tensors(aside / name)
            if self._request.weights.adapter_only and self._request.state.optimizer_steps > 0:
                problems += find_untrained_adapter(aside / name)
            self._rank.phases.beat()
        return problems

    def _publish(self, aside: Path) -> None:
        """Publish the folder once all ranks have written; runs on rank 0."""
        reports = self._wait_for_reports(aside)
        if self.has_failed or self._given_up.is_set():
            return
        # What the ranks wrote.
        files: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for report in reports:
            files |= report["files"]
            tensors |= report["tensors"]
        # The small files are rank 0's.
        state = self._request.state.to_json().encode()
        for name, data in {**self._request.model_files, layout.TRAINER_STATE: state}.items():
            (aside / name).parent.mkdir(exist_ok=True)
            write_atomically(aside / name, data)
            files[name] = hash_file(aside / name)
        for rank in range(len(reports)):
            (aside / _report_name(rank)).unlink()
        # The manifest covers all files, and the folder gets its name.
        about = {
            "kind": "checkpoint",
            **self._request.about,
            "pause_seconds": self.pause_seconds,
            "tensors": tensors,
        }
        write_manifest(aside, files, about, self._request.signer)
        publish(aside, self.folder)
        self._request.published(self.folder)

    def _wait_for_reports(self, aside: Path) -> list[dict[str, Any]]:
        """Wait for the reports of all ranks; return none where one of them failed.

        A rank that dies sends none, but then the supervisor ends this process too.
        """
        paths = [aside / _report_name(rank) for rank in range(self._rank.world_size)]
        while not all(path.is_file() for path in paths):
            if self.has_failed or self._given_up.is_set():
                return []
            # No heartbeat: waiting is no progress, and a rank that hangs must be noticed.
            time.sleep(_POLL_SECONDS)
        return [json.loads(path.read_text()) for path in paths]


def begin_save(module: TrainModule, request: SaveRequest, buffers: Buffers | None) -> PendingSave:
    """Copy the tensors, and start to write them. Collective.

    Args:
        buffers: Host memory for the copies, to write in the background; None writes before it
            returns.

    Raises:
        CheckpointError: On every rank, when the folder could not be made.
    """
    # Rank 0 makes the folder; all wait for it.
    aside = aside_path(request.folder)
    failure: str | None = None
    if module.rank.is_first:
        try:
            make_empty(aside)
        except OSError as error:
            failure = str(error)
    failure = gather_objects(failure, module.rank)[0]
    if failure:
        raise CheckpointError(
            f"{request.folder.name} was not saved ({failure}); fix output_dir and start again"
        )
    # The copies: what the optimizer counts, the weights, its states.
    state = replace(
        request.state, optimizer_steps=optimizer_steps(module), loss_scale=read_loss_scale(module)
    )
    writer = CheckpointWriter(aside, buffers)
    pending = PendingSave(module, replace(request, state=state), writer)
    add_weights(module, request.weights, writer)
    add_states(module, writer)
    pending.begin_writing(background=buffers is not None)
    return pending


def load_checkpoint(module: TrainModule, folder: Path) -> TrainerState:
    """Load the optimizer's state and the loss scale; every rank reads its own slices.

    The weights were loaded when the model was built.

    Raises:
        CheckpointError: The folder is damaged, or of another model.
    """
    state = read_trainer_state(folder)
    load_state_files(module, folder, state.optimizer_steps)
    write_loss_scale(module, state.loss_scale)
    return state


def _report_name(rank: int) -> str:
    return f"written-{rank:05d}.json"


def _describe(writer: CheckpointWriter) -> dict[str, dict[str, Any]]:
    """Return dtype and shape by file and tensor, for the manifest."""
    described: dict[str, dict[str, Any]] = {name: {} for name in writer.files}
    for name, specs in writer.files.items():
        for spec in specs:
            dtype = str(spec.dtype).removeprefix("torch.")
            described[name][spec.name] = [dtype, list(spec.shape)]
    return described
