"""The token ids of a text while it is tokenized: in memory, or in a file when they are many."""

from __future__ import annotations

import os
import tempfile
from array import array
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Ids that are held in memory: 4 MiB.
MEMORY_TOKENS = 1 << 20

_ID_BYTES = np.dtype(np.int32).itemsize


class TokenBuffer:
    """A growing sequence of token ids.

    The file has no name, so that it is gone when the buffer is, or the process.
    """

    def __init__(self, folder: Path | None = None):
        """
        Args:
            folder: Where the file is made; None keeps all ids in memory.
        """
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._in_file = 0
        self._in_memory = array("i")

    def __len__(self) -> int:
        return self._in_file + len(self._in_memory)

    def append(self, ids: NDArray[np.int32]) -> None:
        """Append ids. Shape (tokens,).

        Raises:
            OSError: The disk is full.
        """
        self._in_memory.frombytes(np.ascontiguousarray(ids, dtype=np.int32).tobytes())
        if self._folder is not None and len(self._in_memory) > MEMORY_TOKENS:
            if self._file is None:
                # Closed with the buffer.
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            # One write may take less than it is given.
            unwritten = memoryview(self._in_memory).cast("B")
            while unwritten:
                unwritten = unwritten[self._file.write(unwritten) :]
            self._in_file += len(self._in_memory)
            self._in_memory = array("i")

    def read(self, begin: int, end: int) -> NDArray[np.int32]:
        """Copy the ids from ``begin`` to ``end``. Shape (end - begin,)."""
        ids = np.empty(max(0, min(end, len(self)) - begin), dtype=np.int32)
        from_file = max(0, min(len(ids), self._in_file - begin))
        if self._file is not None and from_file:
            unread = ids[:from_file].data.cast("B")
            offset = begin * _ID_BYTES
            while unread:
                count = os.preadv(self._file.fileno(), [unread], offset)
                if not count:
                    raise OSError("the file of a long text's tokens was cut short")
                unread, offset = unread[count:], offset + count
        if from_file < len(ids):
            first = begin + from_file - self._in_file
            in_memory = np.frombuffer(self._in_memory, dtype=np.int32)
            ids[from_file:] = in_memory[first : first + len(ids) - from_file]
        return ids
