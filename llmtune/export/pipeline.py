"""``export``: from a base and what was trained on it to a published folder, in one of the formats."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtune.config.groups.export import ExportConfig, ExportDtype, ExportFormat
from llmtune.errors import ExportError
from llmtune.export.card.card import write_model_card
from llmtune.export.card.facts import is_hub_id
from llmtune.export.formats.bitsandbytes import write_bnb_4bit
from llmtune.export.formats.gguf.writer import write_gguf
from llmtune.export.formats.graph.writers import write_onnx, write_torchscript
from llmtune.export.formats.model_files import copy_companions, settle_config, settle_generation
from llmtune.export.formats.torch_file import write_torch_file
from llmtune.export.identity import describe_job, describe_options, identify
from llmtune.export.model import ExportRequest, Material, check_links, check_places, open_material
from llmtune.export.publish.folder import check_replaceable, check_room, restore_replaced, write_export
from llmtune.export.publish.shards import Journal, write_shards
from llmtune.export.publish.upload import check_upload, upload_export
from llmtune.export.sources.base import SafetensorsSource
from llmtune.export.verify.checks import check_folder, check_material
from llmtune.model.adapter.stored_adapter import CONFIG_FILE, WEIGHTS_FILE
from llmtune.units import format_bytes

#: Configuration, tokenizer and card beside the weights.
_COMPANION_BYTES = 64 << 20

#: Room that a format takes, as a share of the weights; writers of the others ask for it themselves.
_ROOM = {ExportFormat.safetensors: 1.0, ExportFormat.pt: 1.0, ExportFormat.bnb_4bit: 0.5}

#: Formats that transformers and peft read themselves, and that are checked as they lie on the disk, or not at all.
_AS_STORED = (ExportFormat.safetensors, ExportFormat.adapter)


def run_export(request: ExportRequest, config: ExportConfig) -> Path:
    """Write what ``export.format`` names; the published folder.

    Raises:
        ExportError: Nothing was published.
    """
    if config.format is ExportFormat.none:
        raise ExportError("export=none writes nothing; take export=safetensors or export=adapter")
    if config.format is ExportFormat.adapter and request.adapter is None:
        raise ExportError("export=adapter: this run was a full fine-tuning and has no adapter; take export=safetensors")
    if config.dtype is not ExportDtype.auto and config.format in (ExportFormat.gguf, ExportFormat.adapter):
        key = (
            "export.gguf_type says what it is stored in"
            if config.format is ExportFormat.gguf
            else "it is copied as it is"
        )
        raise ExportError(f"export.dtype={config.dtype.value} has no part in export={config.format.value}: {key}")
    check_places(request)
    check_links(request)
    restore_replaced(request.output)
    if config.upload:
        check_upload(config.upload, config.dry_run)
    material = open_material(request, config)
    about = _describe(request, config)
    check_replaceable(request.output, config.format.value)
    if config.dry_run:
        _say_what_would_be(material, config)
        return request.output

    def write(folder: Path, journal: Journal) -> None:
        check_room(folder, int(material.nbytes * _ROOM.get(config.format, 0.0)) + _COMPANION_BYTES)
        parity = check_material(material, config) if config.format not in _AS_STORED else None
        _WRITERS[config.format](material, folder, journal, config)
        if config.format is ExportFormat.safetensors:
            # Of what lies on the disk now.
            parity = check_folder(material, folder, config)
        write_model_card(folder, request, config, parity.describe() if parity else None)

    write_export(request.output, describe_job(request, config), write, about, request.signer)
    if config.upload:
        upload_export(request.output, config.upload, config.upload_private, False, request.say)
    return request.output


def _describe(request: ExportRequest, config: ExportConfig) -> dict[str, Any]:
    """For the manifest."""
    return {
        "base": request.base_name if is_hub_id(request.base_name) else Path(request.base_name).name,
        "format": config.format.value,
        "source": identify(request.adapter or request.base),
        "options": describe_options(config),
    }


def _say_what_would_be(material: Material, config: ExportConfig) -> None:
    """``export.dry_run``: everything that is opened fits together; nothing is written."""
    request, say = material.request, material.request.say
    changed = material.merged.changed if material.merged is not None else {}
    say(f"would write {config.format.value} to {request.output}")
    say(f"from {request.base}" + (f" and {request.adapter}, which changes {len(changed)} tensors" if changed else ""))
    dtype = str(material.dtype).removeprefix("torch.")
    say(f"{len(material.source.specs)} tensors, {format_bytes(material.nbytes)} in {dtype}")
    if config.upload:
        upload_export(request.output, config.upload, config.upload_private, True, say)


def _write_safetensors(material: Material, folder: Path, journal: Journal, config: ExportConfig) -> None:
    """A model folder as transformers and vLLM load it."""
    if isinstance(material.source, SafetensorsSource):
        _link_weights(material.source, folder)
    else:
        write_shards(material.source, folder, config.max_shard_bytes, journal, material.request.progress)
    copy_companions(material.companions, folder)
    settle_config(folder, material.dtype, material.config_changes)
    settle_generation(folder)


def _write_adapter(material: Material, folder: Path, _journal: Journal, _config: ExportConfig) -> None:
    """A copy of the adapter that peft loads."""
    assert material.adapter is not None
    shutil.copyfile(material.adapter.folder / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    settings = dict(material.adapter.settings)
    if is_hub_id(material.request.base_name):
        # Training may have noted a folder of this machine, where nobody else finds the base.
        settings["base_model_name_or_path"] = material.request.base_name
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    copy_companions([material.adapter.folder], folder)


def _link_weights(source: SafetensorsSource, folder: Path) -> None:
    """Weights that stay as they are need no arithmetic: hard links where the file system has them."""
    index = source.folder / "model.safetensors.index.json"
    for file in [*source.files, *([index] if index.is_file() else [])]:
        (folder / file.name).unlink(missing_ok=True)
        try:
            os.link(file.resolve(), folder / file.name)
        except OSError:
            shutil.copyfile(file, folder / file.name)


_WRITERS: dict[ExportFormat, Callable[[Material, Path, Journal, ExportConfig], None]] = {
    ExportFormat.safetensors: _write_safetensors,
    ExportFormat.adapter: _write_adapter,
    ExportFormat.gguf: write_gguf,
    ExportFormat.onnx: write_onnx,
    ExportFormat.torchscript: write_torchscript,
    ExportFormat.pt: write_torch_file,
    ExportFormat.bnb_4bit: write_bnb_4bit,
}
