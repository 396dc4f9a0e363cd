"""The ``config.json`` of a model folder whose rotary positions are scaled.

The folder has the base's weights and tokenizer, linked. So every rank, every resume and every
export reads the same positions as the training, and none has to be told.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmtune.config.groups.model import ModelConfig
from llmtune.plan.architecture.corrected_architecture import correct_architecture
from llmtune.plan.architecture.rope_scaling import changed_settings, scale_positions
from llmtune.storage.plain_json import parse_json


def scaled_settings(base: Path, config: ModelConfig) -> dict[str, Any]:
    """Return the ``config.json`` of a folder with the positions of ``model.rope_scaling``.

    Raises:
        ConfigError: The folder's model has no rotary positions, or they are scaled already.
    """
    from transformers import AutoConfig

    stored: dict[str, Any] = parse_json((base / "config.json").read_text())
    stored |= correct_architecture(base)
    given = {key: value for key, value in stored.items() if key != "model_type"}
    architecture = AutoConfig.for_model(str(stored.get("model_type")), **given)
    scale_positions(architecture, config.rope_scaling, config.name_or_path)
    text = stored["text_config"] if isinstance(stored.get("text_config"), dict) else stored
    # The old name of rope_parameters, which would win over it.
    text.pop("rope_scaling", None)
    text |= changed_settings(architecture)
    return stored
