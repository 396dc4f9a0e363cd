"""Build a model on the meta device, without any weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmtune.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


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
