"""Identify an export by its sources, and by the options that its bytes depend on."""

from __future__ import annotations

import contextlib
import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune import __version__
from llmtune.config.groups.export import ExportConfig
from llmtune.errors import CheckpointError, ExportError
from llmtune.export.formats.format import find_format
from llmtune.storage import layout
from llmtune.storage.atomic import aside_path, replaced_path
from llmtune.storage.manifest import read_manifest

if TYPE_CHECKING:
    from llmtune.export.request import ExportRequest


def shaping_options(format_name: str) -> frozenset[str]:
    """Return the keys of ``export`` on which files of a format depend.

    The card is one of the files, and says where the export is uploaded to.
    """
    return find_format(format_name).options | {"format", "upload"}


def identify(folder: Path) -> str:
    """Return the hash of a published folder's manifest; empty for a folder without one."""
    marker = folder / layout.COMPLETE
    return marker.read_text() if marker.is_file() else ""


def describe_options(config: ExportConfig) -> dict[str, Any]:
    """Return the options on which bytes of an export depend, as its manifest stores them."""
    options: dict[str, Any] = {}
    shaping = shaping_options(config.format)
    for key in config.__dataclass_fields__:
        if key in shaping:
            value = getattr(config, key)
            options[key] = value.value if isinstance(value, Enum) else value
    # The card names only a repository on the hub; other addresses may hold passwords.
    options["upload"] = find_repo(config)
    return options


def find_repo(config: ExportConfig) -> str | None:
    """Return the repository on the hub that the export is uploaded to; None for other addresses."""
    from llmtune.export.publish.hub import HUB, parse_hub_url

    with contextlib.suppress(ExportError):
        if config.upload and config.upload.startswith(HUB):
            return parse_hub_url(config.upload).repo
    return None


def is_export_of(folder: Path, trained: Path, config: ExportConfig) -> bool:
    """Return whether a folder is the complete export of this adapter or model with these options.

    Hashes are compared, because modification times cannot tell.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return False
    source = identify(trained)
    if not source or manifest.get("source") != source:
        return False
    return bool(manifest.get("options") == describe_options(config))


def describe_job(request: ExportRequest, config: ExportConfig) -> str:
    """Describe the sources and options; two attempts with the same text write the same bytes."""
    # An adapter that was unpacked for this attempt alone is identified by its checkpoint.
    adapter = request.unpacked_from or request.adapter
    folders = [folder for folder in (request.base, adapter, request.zero) if folder is not None]
    files = sorted(
        {file for folder in folders for file in folder.rglob("*") if file.is_file()}
        - _own_files(request)
    )
    about = {
        "llmtune": __version__,
        "files": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "options": describe_options(config),
    }
    return json.dumps(about, sort_keys=True)


def _own_files(request: ExportRequest) -> set[Path]:
    """Return the files of exports to this folder, which may be inside a folder that is exported."""
    output = request.output
    folders = [output, aside_path(output), replaced_path(output)]
    return {file for folder in folders for file in folder.rglob("*")}
