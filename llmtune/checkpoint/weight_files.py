"""Save the trained weights, gathered a few at a time.

Each file is written by one rank, so that no rank holds the model twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmtune.checkpoint.writer import CheckpointWriter
from llmtune.engine.train_module import TrainModule
from llmtune.storage.layout import ADAPTER_WEIGHTS, MODEL_INDEX
from llmtune.storage.tensors.safetensors_writer import describe_shards, plan_shards
from llmtune.storage.tensors.tensor_spec import TensorSpec

#: Bytes gathered by one collective: small tensors one by one would cost a round trip each.
_GATHERED_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The division of a model's weights into files."""

    adapter_only: bool
    """Save the trained adapters in one file, instead of the whole model in shards."""
    max_shard_bytes: int = 5_000_000_000
    file_name: Callable[[str], str] = str
    """Maps a parameter's name to its name in the file."""
    joined: Mapping[str, tuple[torch.Tensor, int]] = field(default_factory=dict)
    """Parameter -> a tensor that is stored behind it, and the dimension along which it is.

    Ranks that do not write the file may have tensors without values.
    """

    def shards(self, module: TrainModule) -> list[tuple[str, list[TensorSpec]]]:
        """List the files by name, and the tensors of each."""
        specs = [
            TensorSpec(self.file_name(name), tensor.dtype, self._stored_shape(name, tensor))
            for name, tensor in _tensors(module, self.adapter_only)
        ]
        if self.adapter_only:
            return [(ADAPTER_WEIGHTS, specs)]
        return plan_shards(specs, self.max_shard_bytes)

    def to_stored(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return what is stored for a parameter, whose whole value is given."""
        if name not in self.joined:
            return tensor
        behind, dim = self.joined[name]
        return torch.cat([tensor, behind.to(tensor.device)], dim)

    def _stored_shape(self, name: str, tensor: torch.Tensor) -> tuple[int, ...]:
        shape = list(_shape(tensor))
        if name in self.joined:
            behind, dim = self.joined[name]
            shape[dim] += behind.shape[dim]
        return tuple(shape)

    def index(self, module: TrainModule) -> dict[str, bytes]:
        """Return the index file, by name; empty where there is one shard only."""
        shards = self.shards(module)
        return {MODEL_INDEX: describe_shards(shards).encode()} if len(shards) > 1 else {}

    def own_specs(self, module: TrainModule) -> dict[str, list[TensorSpec]]:
        """Return the files that this rank writes, and the tensors in each."""
        return dict(self.shards(module)[module.rank.rank :: module.rank.world_size])


def add_weights(module: TrainModule, files: WeightFiles, writer: CheckpointWriter) -> None:
    """Add the files with adapters or the whole model, each on the rank that writes it.

    Collective under ZeRO 3.
    """
    rank = module.rank
    tensors = list(_tensors(module, files.adapter_only))
    # Weights on NVMe are read through a handful of buffers, which hold one tensor at a time.
    limit = 0 if module.placement.param == "nvme" else _GATHERED_BYTES
    with _at_rest(module):
        for index, (name, specs) in enumerate(files.shards(module)):
            is_mine = index % rank.world_size == rank.rank
            if is_mine:
                writer.start(name, specs)
            shard, tensors = tensors[: len(specs)], tensors[len(specs) :]
            for batch in _batches(shard, limit):
                with _gathered(module, [tensor for _, tensor in batch]):
                    if is_mine:
                        for tensor_name, tensor in batch:
                            writer.add(files.to_stored(tensor_name, tensor.data))


def write_model_config(model: Any, folder: Path) -> None:
    """Write ``config.json`` and ``generation_config.json``, which belong beside full weights."""
    config = model.config.to_dict()
    # The folder that this start loaded the weights from; transformers leaves it out, too.
    config.pop("_name_or_path", None)
    config["use_cache"] = True
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(str(folder))


def _tensors(module: TrainModule, adapter_only: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters, tied ones once, and the buffers that belong to a saved model."""
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad or not adapter_only:
            yield name, parameter
    if adapter_only:
        return
    for name, buffer in module.model.named_buffers():
        owner = module.model.get_submodule(name.rpartition(".")[0])
        persistent = name.rpartition(".")[2] not in owner._non_persistent_buffers_set
        if persistent:
            yield name, buffer


def _batches(
    tensors: list[tuple[str, torch.Tensor]], limit: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    batch: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors:
        nbytes = tensor.dtype.itemsize * math.prod(_shape(tensor))
        if batch and size + nbytes > limit:
            yield batch
            batch, size = [], 0
        batch.append((name, tensor))
        size += nbytes
    if batch:
        yield batch


@contextmanager
def _at_rest(module: TrainModule) -> Iterator[None]:
    """Wait, under ZeRO 3, for weights that are being prefetched: those cannot be gathered."""
    if module.zero_stage < 3:
        yield
        return
    optimizer = module.engine.optimizer
    optimizer.checkpoint_event_prologue()
    try:
        yield
    finally:
        optimizer.checkpoint_event_epilogue()


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _gathered(module: TrainModule, tensors: list[torch.Tensor]) -> AbstractContextManager[Any]:
    """Gather tensors on every rank for the length of the block."""
    partitioned = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if module.zero_stage < 3 or not partitioned:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(partitioned)
    return context
