"""A copy of the adapter that peft loads."""

import json
import shutil
from pathlib import Path

from llmtune.config.groups.export import ExportConfig
from llmtune.export.export_model import ExportModel
from llmtune.export.publish.shards import Journal
from llmtune.export.request import is_hub_id
from llmtune.storage.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def write_adapter(
    export_model: ExportModel, folder: Path, _journal: Journal, _config: ExportConfig
) -> None:
    """Copy the weights, and the settings with the name of the base."""
    assert export_model.adapter is not None
    shutil.copyfile(export_model.adapter.folder / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    settings = dict(export_model.adapter.settings)
    if is_hub_id(export_model.request.base_name):
        # Training may have stored a folder of this machine, where nobody else finds the base.
        settings["base_model_name_or_path"] = export_model.request.base_name
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
