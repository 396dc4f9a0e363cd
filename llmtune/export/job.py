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
from llmtune.model.adapters import CONFIG_FILE


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
        tuner = "full fine-tuning" if request.adapter is None else "LoRA"
        write_card(folder, request.output, request.base_name, tuner, facts_of_run(request.run))

    write_export(request.output, write, {"base": request.base_name, "format": config.format.value})
    return request.output


def _copy_adapter(adapter: Path, folder: Path) -> None:
    shutil.copyfile(adapter / CONFIG_FILE, folder / CONFIG_FILE)
    shutil.copyfile(adapter / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    copy_companions([adapter], folder)


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
    (folder / names.CONFIG).unlink(missing_ok=True)
