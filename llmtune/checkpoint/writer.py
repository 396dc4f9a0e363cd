"""Write the tensors of a checkpoint to its files.

They are written at once, or from copies in host memory, by a thread while training continues.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llmtune.storage.tensors.safetensors_writer import TensorFile
from llmtune.storage.tensors.tensor_spec import TensorSpec


class CheckpointWriter:
    """Writes the files of one rank in one save.

    Tensors are added in the order of each file's specs, one file after the other. An error of the
    disk is kept until :meth:`write`: a rank that left between two tensors that all ranks gather
    together would leave the others waiting.
    """

    def __init__(self, folder: Path, hold: Buffers | None = None):
        """
        Args:
            hold: Memory for copies of the tensors until :meth:`write`; None writes each tensor as
                it is added.
        """
        self.folder = folder
        self.files: dict[str, list[TensorSpec]] = {}
        self.entries: dict[str, dict[str, Any]] = {}
        self._metadata: dict[str, dict[str, str]] = {}
        self._hold = hold
        self._held: dict[str, list[torch.Tensor]] = {}
        self._open: TensorFile | None = None
        self._left = 0
        self._failure: OSError | None = None

    def start(
        self, name: str, specs: Sequence[TensorSpec], metadata: dict[str, str] | None = None
    ) -> None:
        """Begin a file."""
        assert self._left == 0, "the previous file is not complete"
        self.files[name] = list(specs)
        self._metadata[name] = metadata or {}
        self._left = len(specs)
        if self._hold is not None:
            self._held[name] = []
        else:
            self._try(lambda: self._begin(name))

    def add(self, tensor: torch.Tensor) -> None:
        """Add the next tensor of the file."""
        name = next(reversed(self.files))
        spec = self.files[name][-self._left]
        self._left -= 1
        if self._hold is not None:
            self._held[name].append(self._hold.copy(name, tensor, spec))
            return
        self._try(lambda: self._append(tensor.detach().to(spec.dtype)))
        if self._left == 0:
            self._try(self._end)

    def wait_for_copies(self) -> None:
        """Wait for the copies: until then, training must not change what is copied."""
        if self._hold is not None:
            self._hold.wait_for_copies()

    def write(self, beat: Callable[[], None]) -> None:
        """Write the held copies.

        Args:
            beat: Called after each tensor, to show that the rank makes progress.

        Raises:
            OSError: The disk refused, now or when a tensor was added.
        """
        if self._failure is not None:
            raise self._failure
        for name, tensors in self._held.items():
            with TensorFile(self.folder / name, self.files[name], self._metadata[name]) as file:
                for tensor in tensors:
                    file.write(tensor)
                    beat()
            self.entries[name] = file.entry

    def _begin(self, name: str) -> None:
        self._open = TensorFile(self.folder / name, self.files[name], self._metadata[name])

    def _append(self, tensor: torch.Tensor) -> None:
        assert self._open is not None
        self._open.write(tensor)

    def _end(self) -> None:
        assert self._open is not None
        with self._open:
            pass
        self.entries[self._open.path.name] = self._open.entry

    def _try(self, act: Callable[[], None]) -> None:
        if self._failure is None:
            try:
                act()
            except OSError as error:
                self._failure = error


class Buffers:
    """Host memory for copies, kept from save to save: fresh pages cost ten times the copying."""

    def __init__(self, device: torch.device | None = None) -> None:
        """
        Args:
            device: Of the tensors. From a GPU they are copied to pinned memory, at several times
                the speed, and the host waits once for all of them.
        """
        self._source = device if device is not None and device.type != "cpu" else None
        self._kept: dict[str, torch.Tensor] = {}
        self._reserving: threading.Thread | None = None

    def reserve(self, files: Mapping[str, Sequence[TensorSpec]]) -> None:
        """Allocate the memory before the first save, in a thread."""

        def touch() -> None:
            for name, specs in files.items():
                for spec in specs:
                    # The kernel provides pages only when they are written.
                    self._kept[_key(name, spec)] = self._make(
                        math.prod(spec.shape), spec.dtype
                    ).zero_()

        self._reserving = threading.Thread(
            target=touch, name="reserve memory for checkpoints", daemon=True
        )
        self._reserving.start()

    def copy(self, file: str, tensor: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
        """Copy a tensor to the host, flattened, in the dtype of ``spec``. Shape (numel,).

        The copy is complete after :meth:`wait_for_copies`.
        """
        self._wait()
        numel = tensor.numel()
        kept = self._kept.get(_key(file, spec))
        if kept is None or kept.numel() != numel or kept.dtype is not spec.dtype:
            kept = self._kept[_key(file, spec)] = self._make(numel, spec.dtype)
        kept.copy_(tensor.detach().reshape(-1), non_blocking=self._source is not None)
        return kept

    def wait_for_copies(self) -> None:
        """Wait for copies from a GPU."""
        if self._source is not None:
            torch.accelerator.current_stream(self._source).synchronize()

    def _make(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        if self._source is not None:
            # Where no more memory can be pinned, pageable memory is used, which is slower.
            with contextlib.suppress(RuntimeError):
                return torch.empty(numel, dtype=dtype, pin_memory=True)
        return torch.empty(numel, dtype=dtype)

    @property
    def nbytes(self) -> int:
        """Return the host memory that is kept, in bytes."""
        self._wait()
        return sum(tensor.nbytes for tensor in self._kept.values())

    def release(self) -> None:
        """Free the memory."""
        self._wait()
        self._kept.clear()
        if self._source is not None:
            # torch's allocator keeps pinned memory that was freed.
            _empty_pinned_cache()

    def _wait(self) -> None:
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None


def _empty_pinned_cache() -> None:
    # The first does not exist in the oldest torch that llmtune supports.
    empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(
        torch._C, "_host_emptyCache", None
    )
    if empty is not None:
        empty()


def _key(file: str, spec: TensorSpec) -> str:
    return f"{file}/{spec.name}"
