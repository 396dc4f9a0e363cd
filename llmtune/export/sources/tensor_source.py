"""The protocol of a model as a stream of tensors, each read block by block.

Every export reads a :class:`TensorSource`, wherever the numbers come from: a folder of safetensors,
a checkpoint's master weights, DeepSpeed's files, or one of these with an adapter merged into it.
The model is never in memory as a whole.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from llmtune.errors import ExportError
from llmtune.storage.layout import MODEL_INDEX, MODEL_WEIGHTS
from llmtune.storage.plain_json import parse_json
from llmtune.storage.tensors.dtypes import WRITABLE, to_torch
from llmtune.storage.tensors.row_blocks import row_ranges
from llmtune.storage.tensors.tensor_spec import TensorSpec
from llmtune.units import some

#: Names of the modules that turn tokens into vectors, and vectors into logits.
_INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_OUTPUT_EMBEDDINGS = ("lm_head", "embed_out", "output")


class TensorSource(Protocol):
    """The tensors of a model by name, in the order in which they are to be written."""

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Return name, dtype and shape of every tensor, as it should be stored."""

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the rows of one tensor in order, a few at a time.

        Blocks are in the dtype of ``specs`` or in a finer one; the writer rounds them.
        """


def read_whole(source: TensorSource, name: str) -> torch.Tensor:
    """Read one tensor in its stored dtype and shape."""
    spec = source.specs[name]
    blocks = [block.to(spec.dtype).reshape(-1) for block in source.blocks(name)]
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks)).reshape(spec.shape)


def are_equal(source: TensorSource, one: str, other: str) -> bool:
    """Compare two tensors of a source: shape, dtype and every number."""
    if replace(source.specs[one], name=other) != source.specs[other]:
        return False
    return all(map(torch.equal, source.blocks(one), source.blocks(other)))


def usual_dtype(source: TensorSource) -> torch.dtype | None:
    """Return the dtype of most of the floating-point bytes; None where there are none."""
    sizes: dict[torch.dtype, int] = {}
    for spec in source.specs.values():
        if spec.dtype.is_floating_point:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def find_name(parameter: str, names: Collection[str]) -> str | None:
    """Find a model's parameter among the tensors of a file.

    Files may leave out, or add, the first part of the parameter's name.
    """
    roots = sorted({name.split(".", 1)[0] for name in names})
    tries = [parameter, parameter.split(".", 1)[-1], *(f"{root}.{parameter}" for root in roots)]
    return next((name for name in tries if name in names), None)


def is_input_embedding(name: str) -> bool:
    """Return whether a tensor is the matrix that turns tokens into vectors."""
    return _is_weight_of(name, _INPUT_EMBEDDINGS)


def is_output_embedding(name: str) -> bool:
    """Return whether a tensor is the matrix that turns vectors into logits."""
    return _is_weight_of(name, _OUTPUT_EMBEDDINGS)


def is_embedding(name: str) -> bool:
    """Return whether a tensor has one row per token."""
    return is_input_embedding(name) or is_output_embedding(name)


def _is_weight_of(name: str, modules: Collection[str]) -> bool:
    module, _, kind = name.rpartition(".")
    return kind == "weight" and module.rpartition(".")[2] in modules


class SafetensorsSource:
    """The weights of a model folder, memory-mapped: the kernel can drop pages that were used."""

    def __init__(self, folder: Path) -> None:
        """Open every file.

        Raises:
            ExportError: A shard is missing, cut off, or holds other tensors than the index says.
        """
        self.folder = folder
        self.specs: dict[str, TensorSpec] = {}
        self._handles: dict[str, Any] = {}
        self.files = _weight_files(folder)
        for file in self.files:
            handle = open_tensors(file)
            for name in handle.keys():  # noqa: SIM118 - no mapping
                self.specs[name] = _spec(handle, name, file)
                self._handles[name] = handle
        _check_index(folder, self._handles)

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield views of the file's own bytes."""
        tensor = self.tensor(name)
        for first, last in row_ranges(tuple(tensor.shape)):
            yield tensor[first:last] if tensor.ndim else tensor

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor, mapped."""
        tensor: torch.Tensor = self._handles[name].get_tensor(name)
        return tensor


class RetypedSource:
    """Another source, with all floating-point tensors stored in one dtype."""

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self._source = source
        self.specs = {
            name: replace(spec, dtype=dtype) if spec.dtype.is_floating_point else spec
            for name, spec in source.specs.items()
        }

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the blocks of the source; the writer rounds them, once."""
        return self._source.blocks(name)


class RenamedSource:
    """Some tensors of another source, under other names."""

    def __init__(self, source: TensorSource, names: dict[str, str]) -> None:
        """Choose the tensors.

        Args:
            names: New name -> name in the source, in the order in which they are to be written.
        """
        self.source, self._names = source, names
        self.specs = {name: replace(source.specs[own], name=name) for name, own in names.items()}

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the blocks of the source."""
        return self.source.blocks(self._names[name])


def open_tensors(file: Path) -> Any:
    """Open a safetensors file; its header is checked against its length.

    Raises:
        ExportError: It cannot be read.
    """
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ExportError(
            f"{file} is cut off or damaged ({error}); fetch or copy it again"
        ) from error


def _spec(handle: Any, name: str, file: Path) -> TensorSpec:
    header = handle.get_slice(name)
    if header.get_dtype() not in WRITABLE:
        raise ExportError(
            f"{file}: {name} has dtype {header.get_dtype()}; only {', '.join(WRITABLE)} can be"
            " exported"
        )
    return TensorSpec(name, to_torch(header.get_dtype()), tuple(header.get_shape()))


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers would load; some folders hold a second copy."""
    index = folder / MODEL_INDEX
    if index.is_file():
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
    elif (folder / MODEL_WEIGHTS).is_file():
        files = [folder / MODEL_WEIGHTS]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ExportError(
            f"{folder} holds no *.safetensors; convert older formats with transformers'"
            " save_pretrained"
        )
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ExportError(
            f"{folder}: {MODEL_INDEX} names {some(missing)}, which is missing; fetch or copy it"
            " again"
        )
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = parse_json(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{index} is no index of safetensors ({error})") from error
    outside = [name for name in weight_map.values() if Path(name).name != name]
    if outside:
        raise ExportError(f"{index} names {outside[0]}, which is not a file of its folder")
    return weight_map


def _check_index(folder: Path, names: Iterable[str]) -> None:
    index = folder / MODEL_INDEX
    if not index.is_file():
        return
    missing = sorted(_weight_map(index).keys() - set(names))
    if missing:
        raise ExportError(
            f"{folder}: {MODEL_INDEX} names tensors that no file holds: {some(missing)}"
        )
