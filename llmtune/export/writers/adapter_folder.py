"""A copy of the adapter that peft loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from llmtune.config.groups.export import ExportConfig
from llmtune.export.identity import is_hub_id
from llmtune.export.model import Material
from llmtune.export.publish.shards import Journal
from llmtune.export.writers.model_files import copy_companions
from llmtune.model.adapter.stored_adapter import CONFIG_FILE, WEIGHTS_FILE


def write_adapter(
    material: Material, folder: Path, _journal: Journal, _config: ExportConfig
) -> None:
    """Weights and settings as they are, but for the name of the base."""
    assert material.adapter is not None
    shutil.copyfile(material.adapter.folder / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    settings = dict(material.adapter.settings)
    if is_hub_id(material.request.base_name):
        # Training may have noted a folder of this machine, where nobody else finds the base.
        settings["base_model_name_or_path"] = material.request.base_name
    (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    copy_companions([material.adapter.folder], folder)
