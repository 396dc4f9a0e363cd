"""A format of export that nobody needs: the names of the tensors, one per line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.config.groups.export import ExportConfig
from llmtune.export.formats.format import FORMATS, MERGED_OPTIONS, Format

if TYPE_CHECKING:
    from llmtune.export.export_model import ExportModel
    from llmtune.export.publish.shards import Journal
    from llmtune.export.usage import Usage


def _write(
    export_model: ExportModel, folder: Path, _journal: Journal, _config: ExportConfig
) -> None:
    (folder / "names.txt").write_text("\n".join(sorted(export_model.source.specs)) + "\n")


def _describe_usage(_usage: Usage) -> str:
    # The card says that commands are run in the folder of the export.
    return "With any pager:\n\n```sh\nless names.txt\n```\n"


NAMES = Format(
    name="names",
    describe=lambda _: "a list of names",
    library="less",
    describe_usage=_describe_usage,
    load_writer=lambda: _write,
    options=MERGED_OPTIONS,
)

FORMATS.register(NAMES)
