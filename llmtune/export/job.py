"""``export``: from a base and what was trained on it to a published folder."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from llmtune.checkpoint import names
from llmtune.config.schema import ExportConfig, ExportFormat
from llmtune.errors import ExportError
from llmtune.export.card import facts_of_run, write_card
from llmtune.export.merge import merge, read_adapter
from llmtune.export.publish import copy_companions, write_export
from llmtune.model.adapters import CONFIG_FILE, WEIGHTS_FILE
from llmtune.model.tokenizer import end_of_turn_ids


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """What is exported, and to where."""

    base: Path
    """Model folder; for full fine-tuning, the trained model itself."""
    base_name: str
    """How the model card calls the base."""
    adapter: Path | None
    """None for full fine-tuning."""
    run: Path | None
    """Whose files describe the training."""
    output: Path


def run_export(request: ExportRequest, config: ExportConfig) -> Path:
    """Write what ``export.format`` names; the published folder.

    Raises:
        ExportError: Nothing was published.
    """
    sources = [folder.resolve() for folder in (request.base, request.adapter) if folder is not None]
    if any(source == request.output.resolve() or request.output.resolve() in source.parents for source in sources):
        raise ExportError(f"output_dir={request.output} holds what is exported; take another output_dir=")
    if config.format is ExportFormat.none:
        raise ExportError("export=none writes nothing; take export=safetensors or export=adapter")
    if config.format is ExportFormat.adapter and request.adapter is None:
        raise ExportError("export=adapter: this run was a full fine-tuning and has no adapter; take export=safetensors")

    def write(folder: Path) -> None:
        if config.format is ExportFormat.adapter:
            assert request.adapter is not None
            _copy_adapter(request.adapter, folder)
        elif request.adapter is None:
            _link_weights(request.base, folder)
        else:
            merge(request.base, read_adapter(request.adapter), folder, config.max_shard_bytes)
            copy_companions([request.base, request.adapter], folder)
        if config.format is not ExportFormat.adapter:
            _settle_generation(folder)
        tuner = "full fine-tuning" if request.adapter is None else "LoRA"
        write_card(folder, request.output, request.base_name, tuner, facts_of_run(request.run))

    about = {
        "base": request.base_name,
        "format": config.format.value,
        "source": identify(request.adapter or request.base),
    }
    write_export(request.output, write, about)
    return request.output


def identify(folder: Path) -> str:
    """What tells one published folder from any other: the hash of its manifest; nothing for a folder of somebody else's."""
    marker = folder / names.COMPLETE
    return marker.read_text() if marker.is_file() else ""


def _copy_adapter(adapter: Path, folder: Path) -> None:
    shutil.copyfile(adapter / CONFIG_FILE, folder / CONFIG_FILE)
    shutil.copyfile(adapter / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    copy_companions([adapter], folder)


def _settle_generation(folder: Path) -> None:
    """Make plain transformers stop where an answer was trained to end, which a base model's own settings do not name."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    file = folder / "generation_config.json"
    settings = GenerationConfig.from_pretrained(str(folder)) if file.is_file() else GenerationConfig()
    own = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    ends = {*end_of_turn_ids(tokenizer), *(token for token in own if token is not None)}
    settings.eos_token_id = sorted(ends) if len(ends) > 1 else next(iter(ends), None)
    settings.pad_token_id = tokenizer.pad_token_id
    # Hub models ship sampling settings that newer versions refuse to store beside greedy decoding.
    if not settings.do_sample:
        settings.temperature = settings.top_p = None
    settings.save_pretrained(str(folder))


def _link_weights(model: Path, folder: Path) -> None:
    """A full model needs no arithmetic: hard links where the file system has them."""
    files = [*model.glob("model*.safetensors"), *model.glob("model.safetensors.index.json")]
    if not files:
        raise ExportError(f"{model} holds no model*.safetensors")
    for file in files:
        try:
            os.link(file, folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)
    copy_companions([model], folder)
