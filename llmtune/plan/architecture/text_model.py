"""The configuration of the language model within a model that also reads images or hears."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Settings of the whole model that its language model has too, where it does not say otherwise.
SHARED = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "torch_dtype",
    "initializer_range",
)


def find_text_type(architecture: PretrainedConfig) -> str | None:
    """Find the architecture of a model's language model.

    Returns:
        Its ``model_type``; None where the model has no other parts, or where transformers has no
        class that is this part alone.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    parts = set(getattr(architecture, "sub_configs", ()))
    if "text_config" not in parts or len(parts) == 1:
        return None
    kind = getattr(getattr(architecture, "text_config", None), "model_type", None)
    return kind if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def take_text_model(architecture: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of a model's language model; its own for one without other parts.

    Whoever trains such a model here trains on text, which never reaches the other parts.
    """
    if find_text_type(architecture) is None:
        return architecture
    whole: Any = architecture
    text: Any = deepcopy(whole.text_config)
    for key in SHARED:
        if getattr(text, key, None) is None and getattr(whole, key, None) is not None:
            setattr(text, key, getattr(whole, key))
    loaded: PretrainedConfig = text
    return loaded
