"""Heads that peft trained on a base without one: classifiers of texts and tokens, answer spans.

Such an adapter names only its task. The architecture is transformers' class for that task and the
base's ``model_type``; the number of classes is the number of rows of the head's last layer.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmtune.errors import ExportError
from llmtune.export.architecture import (
    Task,
    find_architecture,
    headed_task,
    is_renamed,
    read_config,
    task_of,
)
from llmtune.export.merge.adapter import Adapter
from llmtune.export.sources.tensor_source import TensorSource, find_name, is_embedding, usual_dtype
from llmtune.model.skeleton import build_skeleton
from llmtune.storage.tensors.row_blocks import row_ranges
from llmtune.storage.tensors.tensor_spec import TensorSpec
from llmtune.units import some


class TaskHeadSource:
    """A base under the names of the architecture with the head.

    Tensors that this architecture does not have, such as those of another head, are left out.
    """

    def __init__(
        self, base: TensorSource, adapter: Adapter, skeleton: Any, config_changes: dict[str, Any]
    ) -> None:
        """Find the tensors of the model with the head in the base, or else in the adapter.

        Args:
            skeleton: The model with the head, without weights.
            config_changes: Keys of ``config.json`` that differ from the base's: architecture and
                classes.
        """
        self.config_changes = config_changes
        self._base = base
        self._adapter = adapter
        self._stored: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._trained = _trained_whole(adapter)
        dtype = usual_dtype(base) or torch.float32
        for name, tensor in (*skeleton.named_parameters(), *skeleton.named_buffers()):
            shape = tuple(tensor.shape)
            base_name = find_name(name, base.specs)
            if base_name is not None and base.specs[base_name].shape == shape:
                self._stored[name] = base_name
                self.specs[name] = replace(base.specs[base_name], name=name)
            elif name in self._trained:
                self.specs[name] = TensorSpec(name, dtype, shape)

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the base's rows; of a new head, the adapter's."""
        if name in self._stored:
            yield from self._base.blocks(self._stored[name])
            return
        tensor = self._adapter.read(self._trained[name])
        for first, last in row_ranges(tuple(tensor.shape)):
            yield tensor[first:last]


def find_task_head(folder: Path, base: TensorSource, adapter: Adapter) -> TaskHeadSource | None:
    """Put the head that an adapter brings on its base; None where the base has all of its modules.

    Args:
        folder: The model folder of the base; its ``config.json`` is read.

    Raises:
        ExportError: The base has no architecture for the adapter's task, or one that the head does
            not fit.
    """
    task = headed_task(adapter.settings.get("task_type"))
    if task is None or not (folder / "config.json").is_file():
        return None

    # The base may have the head already, for example from an earlier training.
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

    # The last layer has one row per class; every first dimension of a trained tensor is tried.
    architecture = _find_architecture(folder, task)
    for count in sorted({shape[0] for shape in trained.values()}):
        changes = {"architectures": [architecture], **_label_changes(folder, count)}
        skeleton = build_skeleton(folder, changes)
        shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
        if trained.items() <= shapes.items():
            return TaskHeadSource(base, adapter, skeleton, changes)
    head = (
        some([f"{name} {shape}" for name, shape in sorted(trained.items())])
        or "nothing is stored of it"
    )
    raise ExportError(
        f"{adapter.folder}: its head ({head}) does not fit {architecture}, which transformers has"
        " for this base; nothing was written"
    )


def _trained_whole(adapter: Adapter) -> dict[str, str]:
    """Return the tensors of modules that were trained as a whole, but those of embeddings.

    Returns:
        Name in the model -> name in the adapter's file.
    """
    trained: dict[str, str] = {}
    for module, parts in adapter.modules.items():
        if is_embedding(f"{module}.weight"):
            continue
        for part in ("weight", "bias"):
            if part in parts.keys:
                trained[f"{module}.{part}"] = parts.keys[part]
    return trained


def _find_architecture(folder: Path, task: Task) -> str:
    """Return transformers' class with this task's head for the base's ``model_type``."""
    from transformers.models.auto import modeling_auto

    model_type = read_config(folder).get("model_type")
    architecture = getattr(modeling_auto, task.mapping).get(model_type)
    if not isinstance(architecture, str):
        raise ExportError(
            f"{folder / 'config.json'}: transformers has no {task.hub} for model_type {model_type},"
            " which the adapter was trained for; nothing was written"
        )
    return architecture


def _label_changes(folder: Path, count: int) -> dict[str, Any]:
    """Return names of the classes; nothing where the base names as many."""
    known = read_config(folder).get("id2label") or {}
    if len(known) == count:
        return {}
    labels = [f"LABEL_{index}" for index in range(count)]
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
    }
