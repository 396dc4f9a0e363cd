"""Write a stream of tensors as safetensors shards.

The next block is computed while the last one is written and hashed.

Finished shards are noted in a journal beside them, so that an export that was killed continues with
the shard it was in.
"""

import json
import os
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from llmtune.export.progress import ProgressCallbacks
from llmtune.export.sources.tensor_source import TensorSource
from llmtune.storage.atomic import append_line, flush, remove_folder
from llmtune.storage.hashing import hash_file
from llmtune.storage.tensors.safetensors_writer import TensorFile, plan_shards, write_index
from llmtune.storage.tensors.tensor_spec import TensorSpec

JOURNAL = "journal.jsonl"

#: Blocks computed ahead of the one that is being written.
_AHEAD = 2
#: Shards at once, where there are that many pairs of cores.
_MOST_SHARDS = 8


class Journal:
    """The complete files of an unfinished export.

    A journal of another job, or one that cannot be read, counts as empty.
    """

    def __init__(self, folder: Path, job: str) -> None:
        """Read what an earlier start left.

        Args:
            job: Says what is written; a journal of another job, and the files beside it,
                are removed.
        """
        self.path = folder / JOURNAL
        self._lock = threading.Lock()
        self.entries: dict[str, dict[str, Any]] = {}
        lines = self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []
        if not lines or _parse(lines[0]).get("job") != job:
            for file in folder.iterdir():
                remove_folder(file) if file.is_dir() else file.unlink()
            self._append({"job": job})
            return
        for record in map(_parse, lines[1:]):
            file = folder / str(record.get("file"))
            # Read again: a machine that went down may have left a file with its length and without
            # its bytes.
            if "file" in record and file.is_file() and hash_file(file) == record["entry"]:
                self.entries[record["file"]] = record["entry"]

    def note(self, name: str, entry: dict[str, Any]) -> None:
        """Note that a file is complete and on the disk."""
        self.entries[name] = entry
        self._append({"file": name, "entry": entry})

    def close(self) -> None:
        """Remove the journal; its files are about to be published."""
        self.path.unlink()

    def _append(self, record: dict[str, Any]) -> None:
        with self._lock:
            append_line(self.path, json.dumps(record))


def _parse(line: str) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return record


def write_shards(
    source: TensorSource,
    folder: Path,
    max_shard_bytes: int,
    journal: Journal,
    progress: ProgressCallbacks,
) -> None:
    """Write all tensors, in files as transformers names them, with the index.

    Raises:
        ExportError: From the source; finished shards stay for the next start.
    """
    shards = plan_shards(list(source.specs.values()), max_shard_bytes)
    progress.total(sum(spec.nbytes for _, specs in shards for spec in specs))

    def write(shard: tuple[str, list[TensorSpec]]) -> None:
        name, specs = shard
        if name in journal.entries:
            progress.done(sum(spec.nbytes for spec in specs))
            return
        with TensorFile(folder / name, specs) as file:
            for block in _ahead(_blocks(source, specs)):
                file.write(block)
                progress.done(block.nbytes)
        journal.note(name, file.entry)

    # Shards in parallel, each by a thread that computes and one that writes.
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    workers = max(1, min(len(shards), cores // 2, _MOST_SHARDS))
    # Never more than OMP_NUM_THREADS allows.
    torch.set_num_threads(max(1, min(threads, cores // workers)))
    pool = ThreadPoolExecutor(workers)
    try:
        list(pool.map(write, shards))
    finally:
        # A shard that failed ends the export; those that were not begun are not worth writing.
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)
    write_index(folder, shards)
    flush(folder)


def _blocks(source: TensorSource, specs: list[TensorSpec]) -> Iterator[torch.Tensor]:
    """Yield the blocks in the stored dtype: the only rounding."""
    for spec in specs:
        for block in source.blocks(spec.name):
            yield block.to(spec.dtype)


def _ahead(blocks: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the same blocks, computed by a thread that is a few of them ahead."""
    ready: queue.Queue[torch.Tensor | BaseException | None] = queue.Queue(_AHEAD)
    wanted = True

    def compute() -> None:
        try:
            for block in blocks:
                if not wanted:
                    return
                ready.put(block)
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    try:
        while (block := ready.get()) is not None:
            if isinstance(block, BaseException):
                raise block
            yield block
    finally:
        wanted = False
        # The thread may wait for room in the queue; with room it sees that no more is wanted.
        while thread.is_alive():
            try:
                ready.get(timeout=0.05)
            except queue.Empty:
                continue
