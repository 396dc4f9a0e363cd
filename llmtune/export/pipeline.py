"""Export a trained model: from the base and what was trained on it to a published folder."""

from pathlib import Path
from typing import Any

from llmtune.config.groups.export import ExportConfig
from llmtune.errors import ExportError
from llmtune.export.card.card import write_model_card
from llmtune.export.export_model import ExportModel, find_dtype
from llmtune.export.formats.format import find_format
from llmtune.export.identity import describe_job, describe_options, identify
from llmtune.export.open_model import check_links, check_merge, check_places, open_export_model
from llmtune.export.publish.folder import (
    check_replaceable,
    check_room,
    restore_export,
    write_export,
)
from llmtune.export.publish.shards import Journal
from llmtune.export.publish.upload import check_upload, upload_export
from llmtune.export.request import ExportRequest, is_hub_id
from llmtune.export.verify.export_checks import verify_merged_model, verify_written_folder
from llmtune.export.writers.model_files import copy_model_files, write_model_files
from llmtune.units import format_bytes

#: Configuration, tokenizer and card beside the weights.
_MODEL_FILES_BYTES = 64 << 20


def run_export(request: ExportRequest, config: ExportConfig) -> Path:
    """Write and publish what ``export.format`` names, and upload it where that is asked for.

    Returns:
        The published folder; with ``export.dry_run`` the one that would be.

    Raises:
        ExportError: Nothing was published, or it was not uploaded.
        MissingPrerequisiteError: A package or a token is missing.
    """
    kind = find_format(config.format)
    if not kind.is_merged and request.adapter is None:
        raise ExportError(
            f"export={kind.name}: this run was a full fine-tuning and has no adapter; take"
            " export=safetensors"
        )

    # Refuse what cannot work before the model is opened.
    if (problem := kind.find_problems(config)) is not None:
        raise ExportError(problem)
    if kind.is_merged:
        check_merge(request, config.merge_onto)
    check_places(request)
    check_links(request)
    restore_export(request.output)
    if config.upload:
        check_upload(config.upload, config.dry_run)
    export_model = open_export_model(request, config)
    about = _describe_export(request, config)
    check_replaceable(request.output, kind.name)
    if config.dry_run:
        _describe_dry_run(export_model, config)
        return request.output

    # Called on a folder beside the published one. Checks come before the card, which reports them.
    def write(folder: Path, journal: Journal) -> None:
        check_room(folder, int(export_model.nbytes * kind.space) + _MODEL_FILES_BYTES)
        parity = None if kind.is_checked_on_disk else verify_merged_model(export_model, config)
        write_files(export_model, folder, journal, config)
        if kind.is_checked_on_disk and kind.is_merged:
            # Of the files that are on the disk now.
            parity = verify_written_folder(export_model, folder, config)
        write_model_card(folder, request, config, parity.describe() if parity else None)

    write_export(request.output, describe_job(request, config), write, about, request.signer)
    if config.upload:
        upload_export(request.output, config.upload, config.upload_private, False, request.say)
    return request.output


def write_files(
    export_model: ExportModel, folder: Path, journal: Journal, config: ExportConfig
) -> None:
    """Write configuration and tokenizer, and then the weights, whose writers read them.

    Raises:
        ExportError: The format cannot hold the model, or a file cannot be copied.
    """
    kind = find_format(config.format)
    if not kind.is_merged:
        assert export_model.adapter is not None
        copy_model_files([export_model.adapter.folder], folder)
    elif kind.has_model_files:
        dtype = find_dtype(kind.compared_dtype(config)) or export_model.dtype
        write_model_files(export_model.model_files, folder, dtype, export_model.config_changes)
    kind.load_writer()(export_model, folder, journal, config)


def _describe_export(request: ExportRequest, config: ExportConfig) -> dict[str, Any]:
    """Return the fields of the manifest that tell one export from another."""
    return {
        "base": request.base_name if is_hub_id(request.base_name) else Path(request.base_name).name,
        "format": config.format,
        "source": identify(request.adapter or request.base),
        "options": describe_options(config),
    }


def _describe_dry_run(export_model: ExportModel, config: ExportConfig) -> None:
    """Tell the user what an export without ``export.dry_run`` would write."""
    request, say = export_model.request, export_model.request.say
    changed = export_model.merged.changed if export_model.merged is not None else {}
    say(f"would write {config.format} to {request.output}")
    say(
        f"from {request.base}"
        + (f" and {request.adapter}, which changes {len(changed)} tensors" if changed else "")
    )
    dtype = str(export_model.dtype).removeprefix("torch.")
    say(f"{len(export_model.source.specs)} tensors, {format_bytes(export_model.nbytes)} in {dtype}")
    if config.upload:
        upload_export(request.output, config.upload, config.upload_private, True, say)
