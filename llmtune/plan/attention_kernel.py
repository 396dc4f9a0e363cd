"""The attention kernel of a run: eager, SDPA or FlashAttention."""

from __future__ import annotations

import importlib.util

from llmtune.config.schema import Config, Precision
from llmtune.plan.abilities import check_kernel
from llmtune.plan.devices.gpus import FIRST_WITH_BF16

#: Up to this length eager attention is the faster one on a CPU (SmolLM2-135M, 8 x 128 tokens on 2
#: cores: 419 against 316 tokens/s), and its quadratic memory is small.
SHORT_ROW_TOKENS = 512


def resolve_attention(
    config: Config, accelerator: str, kernels: tuple[str, ...], compute_capability: int = 0
) -> str:
    """Return the kernel asked for, or the fastest here of those that the architecture has.

    Args:
        kernels: The architecture's (:func:`llmtune.plan.abilities.attention_kernels`).
        compute_capability: The GPU's; 0 where it is not known.

    Raises:
        ConfigError: The architecture lacks the kernel asked for.
    """
    kernel = config.model.attn_implementation
    if kernel != "auto":
        check_kernel(kernel, kernels, config.model.name_or_path)
        return kernel
    # FlashAttention's kernels are for 16 bits, and for Ampere and later.
    can_flash = (
        config.precision is not Precision.fp32 and not 0 < compute_capability < FIRST_WITH_BF16
    )
    packed = config.data.packing and "flash_attention_2" in kernels
    if accelerator == "cuda" and can_flash and packed and importlib.util.find_spec("flash_attn"):
        # Its varlen kernels skip what SDPA masks: the attention between the documents of a packed
        # row.
        return "flash_attention_2"
    short = accelerator == "cpu" and config.data.max_seq_length <= SHORT_ROW_TOKENS
    return "eager" if short or "sdpa" not in kernels else "sdpa"
