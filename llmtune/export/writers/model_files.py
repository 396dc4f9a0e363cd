"""The files beside the weights: configuration, tokenizer, chat template, generation settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.errors import ExportError
from llmtune.export.architecture import TEXT, TEXT_TO_TEXT, find_architecture, task_of
from llmtune.model.chat_turns import end_of_turn_ids
from llmtune.security.trust import check_foreign, copy_foreign
from llmtune.storage import layout
from llmtune.storage.plain_json import parse_json

if TYPE_CHECKING:
    import torch

#: Suffixes of what is copied. Weights, training state and our own files are left out.
_KEPT_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py")
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".bin")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
_LEFT_OUT = {layout.MANIFEST, layout.TRAINER_STATE, layout.ADAPTER_CONFIG, layout.MODEL_INDEX}
#: Scripts that DeepSpeed puts into its checkpoints.
_LEFT_OUT |= {"zero_to_fp32.py", "zero_to_torch.py"}


def write_model_files(
    sources: list[Path], folder: Path, dtype: torch.dtype | None, changes: dict[str, Any]
) -> None:
    """Write everything of a model folder but the weights.

    Args:
        sources: Folders with configuration and tokenizer; a later one wins.
        dtype: As in :func:`update_config`.
        changes: As in :func:`update_config`.

    Raises:
        ExportError: A file is a link that leads out of its folder, or is no file.
    """
    copy_model_files(sources, folder)
    update_config(folder, dtype, changes)
    update_generation_config(folder)


def copy_model_files(sources: list[Path], folder: Path) -> None:
    """Copy configuration and tokenizer files; a later source wins.

    Raises:
        ExportError: A file is a link that leads out of its folder, or is no file.
    """
    for source in sources:
        for file in _model_files(source):
            copy_foreign(file, folder / file.name, ExportError)


def check_model_files(folder: Path) -> None:
    """Refuse a folder with links to files elsewhere, whose contents an export would publish.

    Raises:
        ExportError: With the first one.
    """
    for file in _model_files(folder):
        check_foreign(file, ExportError)
    for file in sorted(folder.iterdir()):
        if file.is_file() and (file.suffix in _WEIGHT_SUFFIXES or file.name in _LEFT_OUT):
            check_foreign(file, ExportError, most_bytes=None)


def update_config(folder: Path, dtype: torch.dtype | None, changes: dict[str, Any]) -> None:
    """Make ``config.json`` describe the weights that are written.

    Args:
        dtype: The dtype of the stored weights; None keeps what the configuration says.
        changes: Keys that differ from the base's; in a multimodal configuration they are also set
            among the text model's own keys.
    """
    file = folder / "config.json"
    if not file.is_file():
        return
    config: dict[str, Any] = parse_json(file.read_text())
    before = json.dumps(config)
    config.pop("quantization_config", None)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    for key, value in changes.items():
        config[key] = value
        if isinstance(config.get("text_config"), dict):
            config["text_config"][key] = value
    if json.dumps(config) != before:
        file.write_text(json.dumps(config, indent=2) + "\n")


def update_generation_config(folder: Path) -> None:
    """Make plain transformers stop where an answer was trained to end.

    A base model's own settings do not name the end-of-turn token of the chat template.
    """
    from transformers import AutoTokenizer, GenerationConfig

    file = folder / "generation_config.json"
    if not writes_text(folder):
        # The base may have written text, before its head was replaced.
        file.unlink(missing_ok=True)
        return
    if not has_tokenizer(folder):
        return
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    settings = (
        GenerationConfig.from_pretrained(str(folder)) if file.is_file() else GenerationConfig()
    )
    stop_ids = settings.eos_token_id
    if not isinstance(stop_ids, list):
        stop_ids = [stop_ids]
    ends = {*end_of_turn_ids(tokenizer), *(token for token in stop_ids if token is not None)}
    settings.eos_token_id = sorted(ends) if len(ends) > 1 else next(iter(ends), None)
    settings.pad_token_id = tokenizer.pad_token_id
    # Hub models ship sampling settings that newer versions refuse to store beside greedy decoding.
    if not settings.do_sample:
        settings.temperature = settings.top_p = None
    settings.save_pretrained(str(folder))


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a tokenizer in one of the forms that transformers reads."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


def writes_text(folder: Path) -> bool:
    """Return whether the model generates text, so that generation settings have a meaning.

    A configuration that names no architecture counts as one that does.
    """
    architecture = find_architecture(folder)
    return not architecture or task_of(architecture) in (TEXT, TEXT_TO_TEXT)


def _model_files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _KEPT_SUFFIXES and file.name not in _LEFT_OUT:
            yield file
