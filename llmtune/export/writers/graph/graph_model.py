"""Load a model of transformers in fp32 for an exporter: tensors go in, one tensor comes out."""

import contextlib
import inspect
import math
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmtune.config.groups.export import ExportConfig
from llmtune.errors import ExportError, first_line
from llmtune.export.architecture import (
    MASKED_WORDS,
    STATES,
    TEXT,
    TEXT_CLASSES,
    TOKEN_CLASSES,
    find_architecture,
    read_config,
    task_of,
)
from llmtune.export.export_model import ExportModel
from llmtune.export.publish.folder import check_room
from llmtune.export.publish.shards import Journal, write_shards
from llmtune.export.sources.tensor_source import RetypedSource
from llmtune.export.writers.model_files import copy_model_files
from llmtune.units import format_count, some

#: Writing a graph takes one to three times its size in memory: up to 36 GB for this size.
MOST_PARAMETERS = 3_000_000_000

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")

#: Tasks of models with one output tensor.
_TASKS = (TEXT, TEXT_CLASSES, TOKEN_CLASSES, MASKED_WORDS, STATES)

#: Folder for the merged weights in fp32, which transformers loads; removed after that.
_WEIGHTS_FOLDER = "weights.tmp"


class GraphModel(torch.nn.Module):
    """A model of transformers with only tensors as inputs and one tensor as output."""

    def __init__(
        self, model: Any, inputs: tuple[str, ...], output: str, settings: dict[str, Any]
    ) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.output = output
        """``logits``, or ``last_hidden_state`` of a model without a head."""
        self.settings = settings

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the output for ids and mask of shape (batch, length)."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, **types, **self.settings
        )
        output: torch.Tensor = outputs[self.output]
        return output


def check_size(parameters: int) -> None:
    """Refuse a model that is too large to be held in memory by an exporter.

    Raises:
        ExportError: It has more than ``MOST_PARAMETERS``.
    """
    if parameters > MOST_PARAMETERS:
        raise ExportError(
            f"a graph is made of the whole model in memory, and {format_count(parameters)}"
            f" parameters are more than {format_count(MOST_PARAMETERS)}; take export=gguf or"
            " export=safetensors"
        )


def find_loader(folder: Path) -> tuple[str, str]:
    """Return the class of transformers that loads a model folder, and its architecture.

    Raises:
        ExportError: ``config.json`` names neither an encoder nor a decoder of text.
    """
    architecture = find_architecture(folder)
    task = task_of(architecture)
    if task is None or task not in _TASKS or read_config(folder).get("is_encoder_decoder"):
        ends = ", ".join(end for task in _TASKS for end in task.ends)
        raise ExportError(
            f"{folder / 'config.json'}: {architecture or 'no architecture'} is neither an encoder"
            f" nor a decoder of text; graphs are written of {ends}; take export=safetensors"
        )
    return task.loader, architecture


def load_merged_model(export_model: ExportModel, folder: Path, config: ExportConfig) -> GraphModel:
    """Write the merged weights in fp32 to a temporary folder, and load them.

    Args:
        folder: Holds configuration and tokenizer; the weights are removed from it again.

    Raises:
        ExportError: The model is too large or of another kind, or the disk has no room for it
            twice.
    """
    count = sum(math.prod(spec.shape) for spec in export_model.source.specs.values())
    check_size(count)
    check_room(folder, 2 * count * torch.float32.itemsize)
    loader, architecture = find_loader(folder)
    weights = folder / _WEIGHTS_FOLDER
    weights.mkdir(exist_ok=True)
    # In fp32 a merged weight is not rounded at all.
    write_shards(
        RetypedSource(export_model.source, torch.float32),
        weights,
        config.max_shard_bytes,
        Journal(weights, _WEIGHTS_FOLDER),
        export_model.request.progress,
    )
    copy_model_files([folder], weights)
    try:
        return load_graph_model(weights, loader, architecture)
    finally:
        shutil.rmtree(weights)


def load_graph_model(folder: Path, loader: str, architecture: str) -> GraphModel:
    """Load the model in fp32 on the CPU, with the attention that exporters understand.

    Raises:
        ExportError: transformers cannot load it, or some of its weights are missing.
    """
    import transformers

    with _ignore_warnings():
        try:
            model, report = getattr(transformers, loader).from_pretrained(
                str(folder),
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
                trust_remote_code=False,
            )
        except (ValueError, OSError, RuntimeError, ImportError) as error:
            raise ExportError(
                f"transformers cannot load {architecture} with {loader}: {first_line(error)}; take"
                " export=safetensors"
            ) from error

    # A model without a head returns its last hidden states, which the pooler does not touch.
    has_head = loader != "AutoModel"
    missing = sorted(
        name for name in report["missing_keys"] if has_head or not name.startswith("pooler.")
    )
    if missing:
        raise ExportError(
            f"{architecture} in config.json has {len(missing)} weights that are not there:"
            f" {some(missing)}; nothing was written"
        )

    # The inputs that this architecture takes, and its one output.
    accepted = inspect.signature(model.forward).parameters
    type_count = getattr(model.config, "type_vocab_size", 0) or 0
    takes_types = "token_type_ids" in accepted and type_count > 1
    settings: dict[str, Any] = {"return_dict": True}
    if "use_cache" in accepted:
        settings["use_cache"] = False
    return GraphModel(
        model.requires_grad_(False),
        _INPUTS if takes_types else _INPUTS[:2],
        "logits" if has_head else "last_hidden_state",
        settings,
    ).eval()


@contextlib.contextmanager
def refuse_unexportable(model: GraphModel, kind: str) -> Iterator[None]:
    """Turn any error of torch's exporters into an ExportError.

    They raise exceptions of many types, always about a model that they cannot export.

    Raises:
        ExportError: Instead of any of them.
    """
    with _ignore_warnings(), torch.no_grad():
        try:
            yield
        except Exception as error:
            raise ExportError(
                f"torch {torch.__version__} cannot write {type(model.model).__name__} as {kind}:"
                f" {first_line(error)}; take export=safetensors"
            ) from error


@contextlib.contextmanager
def _ignore_warnings() -> Iterator[None]:
    """Hide the exporters' warnings, which are for developers of models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
