"""The hyperparameters of a model as keys of a GGUF file."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter, LlamaFileType, RopeScalingType
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmtune.config.groups.export import GgufType
from llmtune.errors import ExportError

#: transformers' class -> llama.cpp's architecture.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def read_settings(folder: Path) -> tuple[Any, str]:
    """Read the model's configuration, and find llama.cpp's name of its architecture.

    Raises:
        ExportError: llama.cpp cannot run the model, or not as transformers does.
    """
    from transformers import AutoConfig

    try:
        settings: Any = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ExportError(f"export=gguf needs the model's config.json ({error})") from error
    name = (getattr(settings, "architectures", None) or ["(none named in config.json)"])[0]
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise ExportError(
            f"export=gguf cannot write {name}; it can write {', '.join(ARCHITECTURES)}. "
            "For others, export=safetensors and llama.cpp's own convert_hf_to_gguf.py"
        )

    # What llama.cpp would compute otherwise than transformers.
    if settings.hidden_act not in ("silu", "swish"):
        raise ExportError(
            f"export=gguf: hidden_act={settings.hidden_act!r}; llama.cpp computes {name} with silu"
        )
    rope = settings.rope_parameters
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError(
            f"export=gguf: partial_rotary_factor={rope['partial_rotary_factor']}; llama.cpp rotates"
            " whole heads"
        )
    allowed = ["default", "linear", "yarn"]
    if architecture == "llama":
        allowed.append("llama3")
    if rope["rope_type"] not in allowed or rope.get("truncate") is False:
        raise ExportError(
            f"export=gguf: rope_parameters={rope}; for {name} it can write {', '.join(allowed)}"
        )
    return settings, architecture


def add_settings(writer: GGUFWriter, settings: Any, gguf_type: GgufType) -> None:
    """Add the sizes, the rope scaling and the file's type to a ``gguf.GGUFWriter``."""
    head_size = _head_size(settings)
    rope = settings.rope_parameters
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(rope["rope_theta"])
    file_type = "ALL_F32" if gguf_type is GgufType.f32 else f"MOSTLY_{gguf_type.name.upper()}"
    writer.add_file_type(LlamaFileType[file_type])

    # Scaled positions; Llama 3.1's are a tensor, see ``rope_factors``.
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or 32)
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or 1)
        # llama.cpp multiplies its own factor, which is the paper's, by this one.
        paper = 1.0 + 0.1 * math.log(rope["factor"])
        writer.add_rope_scaling_attn_factors(ROPE_INIT_FUNCTIONS["yarn"](settings, None)[1] / paper)


def rope_factors(settings: Any) -> np.ndarray[Any, Any] | None:
    """Return the divisors of the rotation frequencies of Llama 3.1 and later; None for others.

    Returns:
        fp32, shape (head size / 2,).
    """
    if settings.rope_parameters["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](settings, torch.device("cpu"))
    head_size = _head_size(settings)
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    plain = 1.0 / settings.rope_parameters["rope_theta"] ** exponents
    factors: np.ndarray[Any, Any] = (plain / scaled).to(torch.float32).numpy()
    return factors


def _head_size(settings: Any) -> int:
    """Return the head size; some of these architectures leave ``head_dim`` out."""
    own = getattr(settings, "head_dim", None)
    return int(own or settings.hidden_size // settings.num_attention_heads)
