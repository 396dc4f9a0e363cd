"""Save: all ranks write aside, one manifest, one rename, the marker last. A folder is complete or
does not exist.

Ranks talk to each other while they copy, which is in the training thread. Behind that they only
write files, in a thread of their own if there is memory for the copies, and tell rank 0 by one more
file each what they wrote; rank 0 publishes.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmtune.checkpoint.find import REPLACED
from llmtune.checkpoint.optimizer_files import load_state_files, put_states
from llmtune.checkpoint.trainer_state import TrainerState, read_trainer_state
from llmtune.checkpoint.weight_files import WeightFiles, put_weights
from llmtune.checkpoint.writer import Buffers, CheckpointWriter
from llmtune.engine.distributed import all_reduce_any, gather_objects
from llmtune.engine.optimizer_state import optimizer_steps, read_loss_scale, write_loss_scale
from llmtune.engine.train_module import TrainModule
from llmtune.errors import CheckpointError
from llmtune.storage import layout
from llmtune.storage.atomic import write_whole
from llmtune.storage.manifest import hash_file, publish, write_manifest
from llmtune.storage.signature import Signer
from llmtune.storage.tensor_checks import find_tensor_problems, find_untrained_adapter

#: Between two looks of rank 0 at what the others have written.
_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequest:
    """One checkpoint."""

    folder: Path
    state: TrainerState
    weights: WeightFiles
    model_files: dict[str, bytes]
    """Small files of rank 0's: configuration, tokenizer, metrics so far."""
    about: dict[str, Any]
    """More for the manifest."""
    signer: Signer | None = None
    """On rank 0, where checkpoints are signed."""
    published: Callable[[Path], None] = lambda _: None
    """Called on rank 0 behind the last step, in whatever thread that is."""


class DiskRefusedError(CheckpointError):
    """A checkpoint was not written for want of room, or of the right to write."""


class PendingSave:
    """A save under way on this rank: the copies are taken, the files are being written."""

    def __init__(self, module: TrainModule, request: SaveRequest, outbox: CheckpointWriter):
        self.folder = request.folder
        self.pause_seconds = 0.0
        """Training stood still for as long."""
        self.seconds = 0.0
        """From the beginning until the folder was published; on rank 0."""
        self._rank = module.rank
        self._request = request
        self._outbox = outbox
        self._started = time.monotonic()
        self._failure: str | None = None
        self._disk_refused = False
        self._given_up = threading.Event()
        self._thread: threading.Thread | None = None

    def begin_writing(self, background: bool) -> None:
        """Write in a thread, or here. Collective."""
        self._outbox.arrive()
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
        """Whether this rank has nothing left to do."""
        return self._thread is None or not self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows that the checkpoint will not be."""
        return self._failure is not None

    def finish(self) -> None:
        """Wait for the end, on every rank. Collective.

        Raises:
            DiskRefusedError: On every rank, when any rank could not write; nothing is published
                then.
            CheckpointError: The same, when what was written is not worth keeping.
        """
        while True:
            failed, writing = all_reduce_any([self.has_failed, not self.has_ended], self._rank)
            if failed:
                # Rank 0 need not wait for a report that may never come.
                self._given_up.set()
            if not writing:
                break
            time.sleep(_POLL_SECONDS)
        failures = [
            found
            for found in gather_objects((self._failure, self._disk_refused), self._rank)
            if found[0]
        ]
        if failures:
            if self._rank.is_first:
                # Half a checkpoint is of no use, and what is full needs the room.
                shutil.rmtree(aside_folder(self.folder), ignore_errors=True)
            kind = DiskRefusedError if any(refused for _, refused in failures) else CheckpointError
            raise kind(
                f"{self.folder.name} was not saved"
                f" ({'; '.join(dict.fromkeys(text for text, _ in failures))}). Nothing was"
                " published, and those before it are as they were; mend the cause, and the same"
                " command goes on from the newest"
            )

    def _run(self) -> None:
        self._write()
        self._publish_if_first()

    def _write(self) -> None:
        """This rank's files, looked at again, and its report."""
        aside = aside_folder(self.folder)
        with self._noted():
            self._outbox.deliver(self._rank.phases.beat)
            problems = self._find_faults(aside)
            if problems:
                more = " ..." if len(problems) > 3 else ""
                self._failure = f"rank {self._rank.rank}: {'; '.join(problems[:3])}{more}"
                # Without this rank's report nothing is published.
                return
            report = {"files": self._outbox.entries, "tensors": _describe(self._outbox)}
            write_whole(aside / _report_name(self._rank.rank), json.dumps(report).encode())

    def _publish_if_first(self) -> None:
        if self._rank.is_first:
            with self._noted():
                self._publish(aside_folder(self.folder))
        self.seconds = time.monotonic() - self._started

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """What goes wrong is kept for :meth:`finish`: nobody sees the exception of a thread."""
        try:
            yield
        except Exception as error:
            self._disk_refused = isinstance(error, OSError)
            self._failure = self._failure or f"rank {self._rank.rank}: {error}"

    def _find_faults(self, aside: Path) -> list[str]:
        """Open weights again and look at every number."""
        found = []
        for name in self._outbox.files:
            if layout.is_state_file(name):
                continue
            found += find_tensor_problems(aside / name)
            if self._request.weights.adapter_only and self._request.state.optimizer_steps > 0:
                found += find_untrained_adapter(aside / name)
            self._rank.phases.beat()
        return found

    def _publish(self, aside: Path) -> None:
        """On rank 0, when all have written."""
        reports = self._wait_for_reports(aside)
        if self.has_failed or self._given_up.is_set():
            return
        files: dict[str, Any] = {}
        tensors: dict[str, Any] = {}
        for report in reports:
            files |= report["files"]
            tensors |= report["tensors"]
        for name, data in {
            **self._request.model_files,
            layout.TRAINER_STATE: self._state_text(),
        }.items():
            (aside / name).parent.mkdir(exist_ok=True)
            write_whole(aside / name, data)
            files[name] = hash_file(aside / name)
        for number in range(len(reports)):
            (aside / _report_name(number)).unlink()
        about = {
            "kind": "checkpoint",
            **self._request.about,
            "pause_seconds": self.pause_seconds,
            "tensors": tensors,
        }
        write_manifest(aside, files, about, self._request.signer)
        _replace(aside, self.folder)
        self._request.published(self.folder)

    def _wait_for_reports(self, aside: Path) -> list[dict[str, Any]]:
        """Of all ranks; none where one of them failed. A rank that dies ends this process too."""
        paths = [aside / _report_name(rank) for rank in range(self._rank.world_size)]
        while not all(path.is_file() for path in paths):
            if self.has_failed or self._given_up.is_set():
                return []
            # No beat: waiting is no progress, and a rank that hangs must be noticed.
            time.sleep(_POLL_SECONDS)
        return [json.loads(path.read_text()) for path in paths]

    def _state_text(self) -> bytes:
        return self._request.state.to_json().encode()


def begin_save(module: TrainModule, request: SaveRequest, buffers: Buffers | None) -> PendingSave:
    """Copy, and start to write. Collective.

    Args:
        buffers: Host memory for copies, to write in the background; None writes before it returns.

    Raises:
        CheckpointError: On every rank, when the folder could not be made.
    """
    aside = aside_folder(request.folder)
    failure: str | None = None
    if module.rank.is_first:
        try:
            _make_fresh(aside)
        except OSError as error:
            failure = str(error)
    failure = gather_objects(failure, module.rank)[0]
    if failure:
        raise CheckpointError(
            f"{request.folder.name} was not saved ({failure}); mend output_dir and start again"
        )
    state = replace(
        request.state, optimizer_steps=optimizer_steps(module), loss_scale=read_loss_scale(module)
    )
    outbox = CheckpointWriter(aside, buffers)
    pending = PendingSave(module, replace(request, state=state), outbox)
    put_weights(module, request.weights, outbox)
    put_states(module, outbox)
    pending.begin_writing(background=buffers is not None)
    return pending


def load_checkpoint(module: TrainModule, folder: Path) -> TrainerState:
    """Optimizer state and loss scale; the weights were loaded when the model was built. Every rank
    reads its slices.

    Raises:
        CheckpointError: The folder is damaged, or of another model.
    """
    state = read_trainer_state(folder)
    load_state_files(module, folder, state.optimizer_steps)
    write_loss_scale(module, state.loss_scale)
    return state


def aside_folder(folder: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return folder.with_name(folder.name + ".tmp")


def _make_fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _replace(aside: Path, folder: Path) -> None:
    """Publish, in the place of the same step saved before if there is one."""
    old = folder.with_name(folder.name + REPLACED)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    publish(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def _report_name(rank: int) -> str:
    return f"written-{rank:05d}.json"


def _describe(outbox: CheckpointWriter) -> dict[str, dict[str, Any]]:
    """File -> tensor -> dtype and shape, for the manifest."""
    return {
        name: {
            spec.name: [str(spec.dtype).removeprefix("torch."), list(spec.shape)] for spec in specs
        }
        for name, specs in outbox.files.items()
    }
