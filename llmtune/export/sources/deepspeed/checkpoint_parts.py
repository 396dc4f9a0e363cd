"""The parts of a DeepSpeed checkpoint: the whole model, or an adapter and the base below it."""

import re
from dataclasses import replace
from pathlib import Path

import torch

from llmtune.errors import ExportError
from llmtune.export.sources.deepspeed.zero_source import ZeroSource
from llmtune.export.sources.tensor_source import RenamedSource
from llmtune.security.trust import copy_foreign
from llmtune.storage.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llmtune.storage.tensors.safetensors_writer import TensorFile
from llmtune.units import some

_PREFIX = "base_model.model."

#: A tensor of an adapter; the adapter's own name is not in peft's files.
_PART = re.compile(
    r"\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|modules_to_save|"
    r"trainable_tokens_delta)\.(?P<adapter>[^.]+)(?P<rest>\.weight|\.bias|)$"
)

#: Names that peft puts between a module and its own tensor.
_WRAPPERS = re.compile(r"\.(token_adapter\.base_layer|base_layer|original_module)(?=\.[^.]+$)")

#: Tensors that bitsandbytes keeps beside a quantized weight.
_QUANTIZED = (".absmax", ".quant_map", ".SCB")


def has_adapter(source: ZeroSource) -> bool:
    """Return whether the checkpoint is of a LoRA training."""
    return any(_PART.search(name) for name in source.trained)


def open_model_part(source: ZeroSource) -> RenamedSource:
    """Open the model of a full fine-tuning; tied tensors come once, as transformers stores them."""
    return RenamedSource(source, {name: name for name in source.specs if name not in source.shared})


def open_adapter_part(source: ZeroSource) -> RenamedSource:
    """Open everything that was trained, in fp32, under the names of peft's files.

    Raises:
        ExportError: There is no adapter, or more than one.
    """
    matches = [match for match in map(_PART.search, source.trained) if match]
    adapters = sorted({match["adapter"] for match in matches})
    if not adapters:
        raise ExportError(
            f"{source.folder}: no adapter was trained here, such as *.lora_A.default.weight"
        )
    if len(adapters) > 1:
        raise ExportError(
            f"{source.folder} holds several adapters ({some(adapters)}); only one can be exported"
        )
    names: dict[str, str] = {}
    for name in source.specs:
        owner = source.shared.get(name, name)
        part = _PART.search(name)
        # Of the second names of tied tensors, peft stores those of modules_to_save; rows of
        # tokens it ties again when it loads them.
        if owner in source.trained and (
            name == owner or (part and part["part"] == "modules_to_save")
        ):
            names[_file_name(name)] = name
    return RenamedSource(source, names)


def open_base_part(source: ZeroSource) -> RenamedSource:
    """Open the model below the adapter, under its own names; tied tensors come once.

    Raises:
        ExportError: The frozen parameters are not in the checkpoint, or they are quantized.
    """
    names: dict[str, str] = {}
    for name in source.specs:
        if not _PART.search(name) and name not in source.shared:
            names[_WRAPPERS.sub("", name.removeprefix(_PREFIX))] = name

    # Frozen weights may be left out, or quantized: an adapter is not merged onto either.
    weights = [
        name
        for name, own in names.items()
        if own not in source.trained and name.endswith(".weight")
    ]
    if not weights:
        raise ExportError(
            f"{source.folder} holds the adapter alone (it was saved with"
            " exclude_frozen_parameters); name the model below it with base="
        )
    quantized = [name for name in names if name.endswith(_QUANTIZED) or ".quant_state" in name]
    quantized += [name for name in weights if not source.specs[names[name]].dtype.is_floating_point]
    if quantized:
        raise ExportError(
            f"{source.folder} holds the model below the adapter only quantized ({some(quantized)});"
            " name the model that it was quantized from with base="
        )
    return RenamedSource(source, names)


def write_adapter(source: ZeroSource, output: Path) -> bool:
    """Write an adapter's folder as peft does, in fp32.

    Returns:
        Whether there are settings (``adapter_config.json``) beside the checkpoint, which are copied
        too. Without them peft cannot load the folder.

    Raises:
        ExportError: There is no adapter.
    """
    part = open_adapter_part(source)
    specs = [replace(spec, dtype=torch.float32) for spec in part.specs.values()]
    output.mkdir(parents=True, exist_ok=True)
    with TensorFile(output / ADAPTER_WEIGHTS, specs) as file:
        for spec in specs:
            for block in part.blocks(spec.name):
                file.write(block.float())
    settings = find_settings(source)
    if settings is None:
        return False
    copy_foreign(settings, output / ADAPTER_CONFIG, ExportError)
    return True


def find_settings(source: ZeroSource) -> Path | None:
    """Find ``adapter_config.json``, which transformers' Trainer writes beside the step's folder."""
    candidates = (source.folder / ADAPTER_CONFIG, source.folder.parent / ADAPTER_CONFIG)
    return next((file for file in candidates if file.is_file()), None)


def _file_name(name: str) -> str:
    """Return the name in peft's file, without the adapter's name and ``modules_to_save``."""
    match = _PART.search(name)
    if match is None:
        return name
    stem = name[: match.start()]
    if match["part"] == "modules_to_save":
        return stem + match["rest"]
    if match["part"] == "lora_magnitude_vector":
        return f"{stem}.{match['part']}"
    return f"{stem}.{match['part']}{match['rest']}"
