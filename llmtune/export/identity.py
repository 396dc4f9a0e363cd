"""What tells one export from another: what it is made from, and the options that shape its
bytes.
"""

from __future__ import annotations

import contextlib
import json
import re
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
    from llmtune.export.model import ExportRequest

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

#: Options that shape no file of any format.
SHAPING_NOTHING = frozenset({"upload_private", "dry_run"})


def shaping_options(format_name: str) -> frozenset[str]:
    """Keys of ``export`` on which files of a format depend; the card is a file too, and says where
    the export is.
    """
    return find_format(format_name).options | {"format", "upload"}


def is_hub_id(name: str) -> bool:
    """Whether this is a name on the hub and no folder of this machine."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).expanduser().exists()


def identify(folder: Path) -> str:
    """What tells one published folder from any other: the hash of its manifest; nothing for a
    folder of somebody else's.
    """
    marker = folder / layout.COMPLETE
    return marker.read_text() if marker.is_file() else ""


def describe_options(config: ExportConfig) -> dict[str, Any]:
    """The options on which bytes of an export of this format depend, as its manifest notes them."""
    found: dict[str, Any] = {}
    shaping = shaping_options(config.format)
    for key in config.__dataclass_fields__:
        if key in shaping:
            value = getattr(config, key)
            found[key] = value.value if isinstance(value, Enum) else value
    # Of a place the card names the repository on the hub; addresses may hold passwords, and are
    # nobody's business.
    found["upload"] = find_repo(config)
    return found


def find_repo(config: ExportConfig) -> str | None:
    """The repository on the hub that the export goes to; None where it goes elsewhere."""
    from llmtune.export.publish.hub import HUB, parse_hub_url

    with contextlib.suppress(ExportError):
        if config.upload and config.upload.startswith(HUB):
            return parse_hub_url(config.upload).repo
    return None


def is_export_of(folder: Path, trained: Path, config: ExportConfig) -> bool:
    """Whether a folder is the whole export of this very adapter or model, as these options shape
    it; clocks cannot tell.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return False
    return manifest.get("source") == identify(trained) != "" and manifest.get(
        "options"
    ) == describe_options(config)


def describe_job(request: ExportRequest, config: ExportConfig) -> str:
    """What is written from what; two starts with the same text write the same bytes."""
    # What was unpacked into a folder of its own for this start stands for what it was unpacked
    # from.
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
    """What exports to this place have written, should it lie inside a folder that is exported."""
    output = request.output
    folders = [output, aside_path(output), replaced_path(output)]
    return {file for folder in folders for file in folder.rglob("*")}
