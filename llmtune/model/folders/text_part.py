"""The language model within a model that also reads images or hears, as a folder of its own.

What is trained here reads text. Gradients never reach the other parts, and an optimizer's weight
decay would still shrink them, so that they are left out. The tensors get the names of the
architecture's own language model, which transformers, vLLM and llama.cpp load.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtune.errors import MissingPrerequisiteError
from llmtune.model.weights.files import Entry, read_entries, read_slice
from llmtune.plan.architecture.text_model import SHARED, find_text_type
from llmtune.storage.atomic import link_or_copy
from llmtune.storage.layout import MODEL_INDEX
from llmtune.storage.plain_json import parse_json
from llmtune.units import format_bytes

#: Beginnings of the names of the text part's tensors -> those in the language model.
_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "lm_head.": "lm_head.",
}

#: Files for the other parts.
_NOT_TEXT = ("config.json", "preprocessor_config.json", "processor_config.json", MODEL_INDEX)
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx")

_MAX_FILE_BYTES = 5 * 10**9
#: Elements that are copied at once.
_BLOCK = 1 << 24


def has_text_part(folder: Path, kind: str | None) -> bool:
    """Tell whether a folder's model holds a language model among other parts.

    Args:
        kind: The ``model_type`` that the user named; None to go by the folder alone.
    """
    from transformers import CONFIG_MAPPING

    stored = parse_json((folder / "config.json").read_text())
    model_type, text = stored.get("model_type"), stored.get("text_config")
    if model_type not in CONFIG_MAPPING or not isinstance(text, dict):
        return False
    found = find_text_type(CONFIG_MAPPING[model_type].from_dict(stored))
    return found is not None and kind in (None, found)


def write_text_part(base: Path, folder: Path, name: str, say: Callable[[str], None]) -> None:
    """Write the language model of a folder's model into another folder.

    Args:
        name: The model's name in messages.
        say: Told how many bytes are copied.

    Raises:
        MissingPrerequisiteError: None of the names are those of a language model.
    """
    import json

    entries = {
        renamed: entry
        for stored, entry in read_entries(base).items()
        if (renamed := _rename(stored)) is not None
    }
    if not entries:
        raise MissingPrerequisiteError(
            f"{name}: {base} holds no tensor of a language model, whose names begin with"
            f" {' or '.join(_PREFIXES)}; save the language model by itself with transformers'"
            " save_pretrained, and name that folder"
        )
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_text_settings(base), indent=2))
    for file in base.iterdir():
        if file.is_file() and file.suffix not in _WEIGHTS and file.name not in _NOT_TEXT:
            link_or_copy(file, folder / file.name)
    _copy_tensors(entries, folder, name, say)


def _rename(stored: str) -> str | None:
    """Return the name of a tensor in the language model; None for those of other parts."""
    for prefix, new in _PREFIXES.items():
        if stored.startswith(prefix):
            return new + stored.removeprefix(prefix)
    return None


def _text_settings(base: Path) -> dict[str, Any]:
    """Return the ``config.json`` of the language model."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    stored: dict[str, Any] = parse_json((base / "config.json").read_text())
    text = dict(stored["text_config"])
    whole = CONFIG_MAPPING[stored["model_type"]].from_dict(stored)
    text["model_type"] = find_text_type(whole)
    shared = {key: stored[key] for key in SHARED if key in stored}
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text["model_type"]]
    return {**shared, **text, "architectures": [architecture]}


def _copy_tensors(
    entries: dict[str, Entry], folder: Path, name: str, say: Callable[[str], None]
) -> None:
    import math

    from llmtune.storage.tensors.safetensors_writer import TensorFile, plan_shards, write_index
    from llmtune.storage.tensors.tensor_spec import TensorSpec

    specs = [TensorSpec(key, entry.dtype, entry.shape) for key, entry in sorted(entries.items())]
    size = format_bytes(sum(spec.nbytes for spec in specs))
    say(f"copying the language model of {name}, {size}, into {folder.parent} (once) ...")
    shards = plan_shards(specs, _MAX_FILE_BYTES)
    for file, members in shards:
        with TensorFile(folder / file, members) as writer:
            for spec in members:
                count = math.prod(spec.shape)
                for start in range(0, count, _BLOCK):
                    writer.write(read_slice(entries[spec.name], start, min(_BLOCK, count - start)))
    write_index(folder, shards)
