"""Read what ``torch.save`` wrote without running any of it; tensors are mapped, not copied.

Such a file is a zip archive of stored members: a pickle, and the bytes of each storage. The pickle
is read by an unpickler that imports nothing: plain containers and tensors come out as what they
are, every other object as an empty stand-in. So a file of a stranger cannot run code, and the
program that wrote it need not be installed.

``torch.load(weights_only=True, mmap=True)`` with stand-ins (``torch.serialization.safe_globals``
for all that ``get_unsafe_globals_in_checkpoint`` lists) is no replacement. Tried with torch 2.13 on
DeepSpeed's files of ZeRO 1 to 3, it reads the same bits and maps 1 GB in 1 MB of memory, but:

* ``torch/_weights_only_unpickler.py`` refuses names of ``os``, ``posix`` and ``sys`` even where a
  stand-in has them, items and entries of stand-ins (subclasses of ``dict`` and ``list``), and the
  opcodes of pickle protocol 4. One such object makes the whole file unreadable.
* It calls what it trusts: ``bytearray(2 << 30)`` in a pickle of 40 bytes takes 2 GB.
* With ``set_default_mmap_options(MAP_SHARED)`` a tensor that is written to changes the file. The
  private mapping promises memory, which Linux refuses for files larger than the machine's memory.
* The list of safe names belongs to the process, and so to all of its threads.

The mapping here is private and promises nothing (``MAP_NORESERVE``).
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtune.errors import ExportError

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_SIGNATURE = b"PK\x03\x04"

#: Linux counts no memory for such a mapping; ``mmap`` has the name from Python 3.13 on.
_NO_RESERVE = 0x4000

#: Bytes of a tensor that may exceed its storage: some programs store an expanded mask.
_MAX_EXPANDED_BYTES = 64 << 20

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class StoredStorage:
    """The bytes of one member of the archive."""

    data: torch.Tensor
    """uint8, mapped."""
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor of the archive; its numbers are mapped on demand."""

    storage: StoredStorage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def open(self) -> torch.Tensor:
        """Return a view of the file's own bytes; writing to it does not change the file."""
        if not self.numel:
            return torch.empty(self.shape, dtype=self.dtype)
        data = self.storage.data
        if data.storage_offset() % self.dtype.itemsize:
            data = data.clone()
        return data.view(self.dtype).as_strided(
            self.shape, self.stride, data.storage_offset() // self.dtype.itemsize + self.offset
        )


class Inert:
    """Replaces an object of any class: accepts all that a pickle does to it, and ignores it."""

    __slots__ = ("arguments",)
    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any, **_: Any) -> Inert:
        """Accept the arguments of the class that it replaces."""
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        """Ignore the arguments, which ``__new__`` stored."""

    def swallow(self, *_: Any) -> None:
        """Ignore state, items and attributes."""

    __setstate__ = __setitem__ = append = extend = add = swallow


class _Maker:
    """One of the few functions that a pickle may call."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, _: Any) -> None:
        """A pickle could otherwise give it another function."""


def read_archive(file: Path) -> Any:
    """Read the saved object; tensors are :class:`StoredTensor`, foreign objects :class:`Inert`.

    Raises:
        ExportError: The file is missing, cut off, or was not written by torch.
    """
    try:
        return _Archive(file).load()
    except ExportError:
        raise
    except zipfile.BadZipFile as error:
        raise ExportError(
            f"{file} is cut off, or not in the zip format of torch.save (DeepSpeed's"
            f" checkpoint_serialization=false and its fast writer use another): {error}; fetch or"
            " copy it again"
        ) from error
    except Exception as error:
        # A broken pickle raises whatever its bytes happen to ask for.
        raise ExportError(
            f"{file} cannot be read ({type(error).__name__}: {error}); fetch or copy it again"
        ) from error


class _Archive:
    """The members of one file, and the bytes that are mapped."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with file.open("rb") as opened:
            with zipfile.ZipFile(opened) as archive:
                self._members = {member.filename: member for member in archive.infolist()}
            self._map = mmap.mmap(
                opened.fileno(),
                0,
                flags=mmap.MAP_PRIVATE | _NO_RESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        pickles = [
            name for name in self._members if name.count("/") == 1 and name.endswith("/data.pkl")
        ]
        if len(pickles) != 1:
            raise ExportError(f"{file} holds no data.pkl: it is not a file of torch.save")
        self._root = pickles[0].removesuffix("data.pkl")
        self._storages: dict[str, StoredStorage] = {}

    def load(self) -> Any:
        """Return the saved object."""
        if f"{self._root}byteorder" in self._members and self._read("byteorder") != b"little":
            raise ExportError(
                f"{self.file} was written by a big-endian machine, which is not supported"
            )
        return _Unpickler(io.BytesIO(self._read("data.pkl")), self.storage).load()

    def storage(self, saved: Any) -> StoredStorage:
        """Map the storage that a tensor of the pickle names."""
        kind, dtype, key, _, numel = saved
        known = kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str)
        if not known or not isinstance(numel, int) or numel < 0:
            # The value is not part of the message: nested lists may print longer than memory.
            raise ExportError(f"{self.file} holds a storage of another kind than tensors have")
        if key not in self._storages:
            nbytes = numel * dtype.itemsize
            first, size = self._locate(f"data/{key}") if nbytes else (0, 0)
            if size < nbytes:
                raise ExportError(
                    f"{self.file} is damaged: storage {key} has {size} bytes of {nbytes}"
                )
            self._storages[key] = StoredStorage(self._bytes[first : first + nbytes], dtype)
        return self._storages[key]

    def _read(self, name: str) -> bytes:
        first, size = self._locate(name)
        return self._map[first : first + size]

    def _locate(self, name: str) -> tuple[int, int]:
        """Return first byte and length of a member."""
        member = self._members.get(self._root + name)
        if member is None:
            raise ExportError(f"{self.file} is damaged: it holds no {name}")
        header = self._map[member.header_offset : member.header_offset + _LOCAL_HEADER.size]
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        first = member.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        is_complete = signature == _SIGNATURE and first + member.file_size <= len(self._map)
        if not is_complete or member.compress_type != zipfile.ZIP_STORED:
            raise ExportError(f"{self.file} is damaged: {name} is not where the archive says")
        return first, member.file_size


class _Unpickler(pickle.Unpickler):
    """Makes plain containers and tensors, and imports nothing."""

    def __init__(self, file: io.BytesIO, storage: Callable[[Any], StoredStorage]) -> None:
        super().__init__(file, encoding="utf-8")
        self._storage = storage
        self._strangers: dict[str, type[Inert]] = {}

    def persistent_load(self, pid: Any) -> StoredStorage:
        """Return a storage, which torch keeps outside the pickle."""
        return self._storage(pid)

    def find_class(self, module: str, name: str) -> Any:
        """Return a plain container, one of the functions that make a tensor, or a stand-in."""
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        # Not getattr, which makes torch import further modules.
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        path = f"{module}.{name}"
        if path not in self._strangers:
            self._strangers[path] = type(path, (Inert,), {"__slots__": ()})
        return self._strangers[path]


def _make_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> StoredTensor:
    """Do what ``torch._utils._rebuild_tensor_v2`` and its variants do with these arguments."""
    dtype = next((item for item in rest if isinstance(item, torch.dtype)), storage.dtype)
    tensor = StoredTensor(
        storage=storage,
        dtype=dtype,
        offset=int(offset),
        shape=tuple(map(int, shape)),
        stride=tuple(map(int, stride)),
    )
    if (
        len(tensor.shape) != len(tensor.stride)
        or min((tensor.offset, *tensor.shape, *tensor.stride)) < 0
    ):
        raise ValueError(f"a tensor of shape {tensor.shape} with strides {tensor.stride}")

    # The file chooses offsets and strides: all elements must be within the storage.
    last = tensor.offset + sum(
        (size - 1) * step for size, step in zip(tensor.shape, tensor.stride, strict=True)
    )
    if tensor.numel and (last + 1) * dtype.itemsize > storage.data.numel():
        raise ValueError(f"a tensor of shape {tensor.shape} goes beyond its storage")
    # A stride of 0 repeats one number, and a copy of such a tensor holds all repetitions.
    if tensor.numel * dtype.itemsize > max(storage.data.numel(), _MAX_EXPANDED_BYTES):
        raise ValueError(
            f"a tensor of shape {tensor.shape} is made of a storage of {storage.data.numel()} bytes"
        )
    return tensor


def _make_subclass(make: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    """Make a tensor without the attributes of its subclass."""
    return make(*arguments) if isinstance(make, _Maker) else Inert()


def _make_parameter(data: Any, *_: Any) -> Any:
    return data


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _Maker(_make_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Maker(_make_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Maker(_make_tensor),
    ("torch._utils", "_rebuild_parameter"): _Maker(_make_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Maker(_make_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): _Maker(_make_subclass),
    **{
        ("builtins", kind.__name__): kind
        for kind in (set, frozenset, list, dict, tuple, int, float, bool, str)
    },
}
_KNOWN |= {
    ("__builtin__", name): kind for (module, name), kind in _KNOWN.items() if module == "builtins"
}
