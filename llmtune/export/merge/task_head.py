"""Heads that peft trained on a base that has none, or another one: classes of texts and tokens,
places of answers.

Such an adapter names only its task; the architecture is transformers' for that task and the base's
``model_type``, and the number of classes is that of the head's last rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmtune.errors import ExportError
from llmtune.export.architecture import Task, find_architecture, headed_task, is_renamed, task_of
from llmtune.export.merge.peft_adapter import Adapter
from llmtune.export.sources.tensor_source import (
    TensorSource,
    find_name,
    is_embedding,
    some,
    usual_dtype,
)
from llmtune.model.skeleton import build_skeleton
from llmtune.storage.plain_json import parse_json
from llmtune.storage.row_blocks import row_ranges
from llmtune.storage.safetensors_writer import TensorSpec


@dataclass(frozen=True, slots=True)
class TaskHead:
    """What the adapter makes of its base."""

    changes: dict[str, Any]
    """Keys of ``config.json`` that are no longer the base's: architecture and classes."""
    skeleton: Any
    """The model with the head, without weights."""


class TaskHeadSource:
    """A base under the names of the architecture with the head; what that lacks, such as another
    head, is left out.
    """

    def __init__(self, base: TensorSource, adapter: Adapter, head: TaskHead) -> None:
        self._base = base
        self._adapter = adapter
        self._stored: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._trained = _trained_whole(adapter)
        dtype = usual_dtype(base) or torch.float32
        for name, tensor in (*head.skeleton.named_parameters(), *head.skeleton.named_buffers()):
            shape, found = tuple(tensor.shape), find_name(name, base.specs)
            if found is not None and base.specs[found].shape == shape:
                self._stored[name] = found
                self.specs[name] = replace(base.specs[found], name=name)
            elif name in self._trained:
                self.specs[name] = TensorSpec(name, dtype, shape)

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The base's rows; of a new head, the adapter's."""
        if name in self._stored:
            yield from self._base.blocks(self._stored[name])
            return
        tensor = self._adapter.read(self._trained[name])
        for first, last in row_ranges(tuple(tensor.shape)):
            yield tensor[first:last]


def find_task_head(folder: Path, base: TensorSource, adapter: Adapter) -> TaskHead | None:
    """The head that an adapter brings; None where the base has all of its modules already.

    Args:
        folder: Whose ``config.json`` describes the base.

    Raises:
        ExportError: The base has no architecture for the adapter's task, or one that the head does
            not fit.
    """
    task = headed_task(adapter.settings.get("task_type"))
    if task is None or not (folder / "config.json").is_file():
        return None
    trained = {name: adapter.shapes[key] for name, key in _trained_whole(adapter).items()}
    if task_of(find_architecture(folder)) is task and all(
        name in base.specs and base.specs[name].shape == shape for name, shape in trained.items()
    ):
        return None
    if is_renamed(folder):
        raise ExportError(
            f"{adapter.folder}: a head for {task.hub} cannot be put on {folder}, whose stored names"
            " transformers translates; merge it with peft"
        )
    architecture = _find_headed(folder, task)
    for count in sorted({shape[0] for shape in trained.values()}):
        changes = {"architectures": [architecture], **_label(folder, count)}
        skeleton = build_skeleton(folder, changes)
        wanted = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
        if trained.items() <= wanted.items():
            return TaskHead(changes, skeleton)
    head = (
        some([f"{name} {shape}" for name, shape in sorted(trained.items())])
        or "nothing is stored of it"
    )
    raise ExportError(
        f"{adapter.folder}: its head ({head}) does not fit {architecture}, which transformers has"
        " for this base; nothing was written"
    )


def _trained_whole(adapter: Adapter) -> dict[str, str]:
    """Tensors of modules that were trained as a whole, embeddings apart: name in the model -> name
    in the adapter's file.
    """
    return {
        f"{module}.{part}": parts.keys[part]
        for module, parts in adapter.modules.items()
        for part in ("weight", "bias")
        if part in parts.keys and not is_embedding(f"{module}.weight")
    }


def _find_headed(folder: Path, task: Task) -> str:
    """The architecture with this task's head."""
    from transformers.models.auto import modeling_auto

    model_type = parse_json((folder / "config.json").read_text()).get("model_type")
    found = getattr(modeling_auto, task.mapping).get(model_type)
    if not isinstance(found, str):
        raise ExportError(
            f"{folder / 'config.json'}: transformers has no {task.hub} for model_type {model_type},"
            " which the adapter was trained for; nothing was written"
        )
    return found


def _label(folder: Path, count: int) -> dict[str, Any]:
    """Names for the classes; the base's where it has as many."""
    known = parse_json((folder / "config.json").read_text()).get("id2label") or {}
    if len(known) == count:
        return {}
    labels = [f"LABEL_{number}" for number in range(count)]
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }
