"""The trained weights from the live ranks: one tensor gathered at a time, so that no rank holds the model twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from llmtune.checkpoint.tensor_file import TensorFile, TensorSpec, plan_shards, write_index
from llmtune.engine.module import TrainModule

#: peft's name.
ADAPTER_FILE = "adapter_model.safetensors"


def write_weights(
    module: TrainModule,
    folder: Path,
    adapter_only: bool,
    max_shard_bytes: int,
    file_name: Callable[[str], str] = str,
) -> None:
    """Write adapters (one file) or the whole model (shards and index). Collective; only rank 0 writes.

    Args:
        file_name: A parameter's name in the file.

    A failing write on rank 0 is raised after the last gather, so that no other rank is left waiting in one.
    """
    with _at_rest(module):
        _write_weights(module, folder, adapter_only, max_shard_bytes, file_name)


def _write_weights(
    module: TrainModule, folder: Path, adapter_only: bool, max_shard_bytes: int, file_name: Callable[[str], str]
) -> None:
    tensors = list(_tensors(module, adapter_only))
    specs = [TensorSpec(file_name(name), tensor.dtype, _shape(tensor)) for name, tensor in tensors]
    shards = plan_shards(specs, max_shard_bytes)
    if adapter_only:
        shards = [(ADAPTER_FILE, specs)]
    failure: Exception | None = None
    queue = iter(tensors)
    for name, shard in shards:
        file: TensorFile | None = None
        for _ in shard:
            _, tensor = next(queue)
            with _whole(module, tensor):
                if not module.rank.is_first or failure is not None:
                    continue
                try:
                    file = file or TensorFile(folder / name, shard)
                    file.write(tensor.data)
                except OSError as error:
                    failure = error
        if file is not None:
            try:
                file.__exit__(type(failure) if failure else None, failure, None)
            except OSError as error:
                failure = failure or error
    if failure is not None:
        raise failure
    if module.rank.is_first and not adapter_only:
        write_index(folder, shards)


def write_model_config(model: Any, folder: Path) -> None:
    """``config.json`` and ``generation_config.json`` beside full weights."""
    config = model.config.to_dict()
    config["use_cache"] = True
    config["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(str(folder))


def _tensors(module: TrainModule, adapter_only: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, tied ones once, and the buffers that belong to a saved model."""
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


@contextmanager
def _at_rest(module: TrainModule) -> Iterator[None]:
    """Under ZeRO 3 weights that were prefetched for a next layer may still be on their way, and cannot be gathered then."""
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


def _whole(module: TrainModule, tensor: torch.Tensor) -> AbstractContextManager[Any]:
    if module.zero_stage < 3 or not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([tensor])
    return context
