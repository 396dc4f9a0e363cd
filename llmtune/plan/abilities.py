"""Limits of an architecture (attention kernels, row lengths, ZeRO stages), and a run's kernel."""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING, Any

from llmtune.config.groups.model import Kernels
from llmtune.config.groups.train import Compile, TrainConfig
from llmtune.config.schema import Config, Precision
from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.plan.architecture.rope_scaling import COUNTS_SCALED
from llmtune.plan.devices.gpus import FIRST_WITH_BF16
from llmtune.tuner.blocks import find_blocks
from llmtune.varlen_attention import VARLEN

if TYPE_CHECKING:
    from torch import nn

#: Attention kernel in transformers -> the attribute of a model's class that says whether it has it.
_KERNELS = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}

#: How layers can be computed again in the backward pass: each by itself, all or none, or never.
ONE_BY_ONE, TOGETHER, NEVER = "one by one", "together", "never"

#: Kinds of rotary scaling whose ``factor`` multiplies the trained positions.
_SCALING = ("linear", "dynamic", "yarn")


def attention_kernels(model: Any) -> tuple[str, ...]:
    """List the attention kernels of a model or its class; all have ``eager``, which comes first."""
    return ("eager", *(kernel for kernel, flag in _KERNELS.items() if getattr(model, flag, False)))


def check_kernel(kernel: str, kernels: tuple[str, ...], name: str) -> None:
    """Refuse a kernel that the architecture lacks; unknown names are left to transformers.

    Args:
        kernels: The architecture's.
        name: The model's name in the message.

    Raises:
        ConfigError: transformers does not have it for this architecture.
    """
    if kernel in (*_KERNELS, VARLEN) and kernel not in kernels:
        why = "transformers has no such kernel for the architecture"
        if kernel == VARLEN:
            why = "documents without padding cannot be told apart by borders alone in the model"
        raise ConfigError(
            f"model.attn_implementation={kernel}: {why} of {name}, only {' and '.join(kernels)};"
            " take model.attn_implementation=auto or eager"
        )


def is_encoder(architecture: Any) -> bool:
    """Tell whether models of a configuration predict masked tokens, as BERT and its kin do.

    As decoders they are causal.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return (
        architecture.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not getattr(architecture, "is_decoder", False)
        and not getattr(architecture, "is_encoder_decoder", False)
    )


def is_bidirectional(model: Any) -> bool:
    """Tell whether tokens attend to later ones.

    Some configurations say so, of others the layers do. DeBERTa's say nothing, but it predicts
    masked tokens.
    """
    text = model.config.get_text_config()
    if getattr(text, "is_causal", True) is False:
        return True
    if getattr(text, "use_bidirectional_attention", False):
        return True
    layers = any(getattr(module, "is_causal", True) is False for module in model.modules())
    return layers or is_encoder(text)


def max_positions(model: nn.Module, architecture: Any) -> int | None:
    """Return the tokens of the longest row that the model has positions for; None without a limit.

    Learned positions end with their table. Rotary ones can be computed for any row, but mean
    nothing to the model beyond those that it was trained on, which the configuration names. Where a
    scaling multiplies them, and the configuration does not say whether its value is before or after
    the scaling, the larger is taken. ALiBi and recurrent layers have no limit.

    Args:
        model: The model, on the meta device.
        architecture: Its transformers configuration.
    """
    from torch import nn

    text = architecture.get_text_config()
    known = named_positions(text)
    if (
        known is None
        or getattr(text, "alibi", False)
        or not getattr(text, "num_attention_heads", None)
    ):
        return None
    for name, module in model.named_modules():
        # RoBERTa's positions begin after its padding token's, in the same table.
        if (
            isinstance(module, nn.Embedding)
            and "position" in name
            and module.padding_idx is not None
        ):
            known = min(known, module.num_embeddings - module.padding_idx - 1)
    return max([known, *_scaled_positions(text, known)])


def named_positions(text: Any) -> int | None:
    """Read the number of positions from a configuration; None where it names none, or -1."""
    keys = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
    for key in keys:
        positions = getattr(text, key, None)
        if isinstance(positions, int) and positions > 0:
            return positions
    return None


def _scaled_positions(text: Any, known: int) -> list[int]:
    if text.model_type in COUNTS_SCALED:
        return []
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]
    return [
        round(float(kind["factor"]) * (kind.get("original_max_position_embeddings") or known))
        for kind in kinds
        if kind.get("rope_type", kind.get("type")) in _SCALING and kind.get("factor")
    ]


def check_row_length(
    max_seq_length: int, positions: int | None, name: str, scaled_by: float | None = None
) -> None:
    """Refuse rows that are longer than the model has positions.

    Args:
        scaled_by: The factor of ``model.rope_scaling``, 1 without it; None where it cannot multiply
            them.

    Raises:
        ConfigError: With the longest length that it takes.
    """
    if positions is not None and max_seq_length > positions:
        instead = "a model with more of them"
        if scaled_by is not None:
            factor = math.ceil(max_seq_length / positions * scaled_by)
            instead = f"scale them: model.rope_scaling={{rope_type: yarn, factor: {factor}}}"
        raise ConfigError(
            f"data.max_seq_length={max_seq_length}: {name} has {positions} positions, and later"
            f" tokens would be out of its range; take data.max_seq_length={positions}"
            f" or less (data.overlong says what happens to longer rows), or {instead}"
        )


#: Architectures that use a layer's weight without calling the layer, so that ZeRO 3 has not
#: gathered it.
_NOT_PARTITIONED = ("gemma3n", "gemma3n_text")


def check_stage(stage: int, kind: str, name: str) -> None:
    """Refuse ZeRO 3 for architectures whose weights it cannot gather in time.

    Args:
        kind: The architecture's ``model_type``.
        name: The model's name in the message.

    Raises:
        ConfigError: It would fail in the first backward pass.
    """
    if stage == 3 and kind in _NOT_PARTITIONED:
        raise ConfigError(
            f"zero=3: {name} ({kind}) uses weights without calling the layers that own them, and"
            " DeepSpeed would not have gathered them; take zero=2"
        )


def find_recomputing(model: Any) -> str:
    """Tell how the layers of a model can be computed again in the backward pass.

    Each can be by itself where it is transformers' ``GradientCheckpointingLayer``. Models of two
    stacks, models that use a layer several times, and code of their own have one switch for all.

    Args:
        model: A transformers model, on any device.

    Returns:
        :data:`ONE_BY_ONE`, :data:`TOGETHER` or :data:`NEVER`.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not getattr(model, "supports_gradient_checkpointing", False):
        return NEVER
    blocks = find_blocks(model)
    text = model.config.get_text_config()
    if (
        blocks is None
        or getattr(model.config, "is_encoder_decoder", False)
        or len(blocks.modules) != getattr(text, "num_hidden_layers", None)
        or not all(isinstance(block, GradientCheckpointingLayer) for block in blocks.modules)
    ):
        return TOGETHER
    return ONE_BY_ONE


def check_recomputing(setting: bool | int | str, recomputing: str, layers: int, name: str) -> None:
    """Refuse recomputation that the architecture does not have.

    Args:
        setting: ``train.gradient_checkpointing``.
        recomputing: The architecture's, of :func:`find_recomputing`.
        layers: The number of its layers.
        name: The model's name in the message.

    Raises:
        ConfigError: It cannot recompute its layers, or not one by one, or has fewer of them.
    """
    key = f"train.gradient_checkpointing={str(setting).lower()}"
    if setting in (False, "auto"):
        return
    if recomputing == NEVER:
        raise ConfigError(
            f"{key}: transformers cannot compute the layers of {name} again; take auto or false"
        )
    if setting is True:
        return
    if recomputing == TOGETHER:
        raise ConfigError(
            f"{key}: the layers of {name} can be computed again together, not one by one; take"
            " auto, true or false"
        )
    if int(setting) > layers:
        raise ConfigError(
            f"{key}: {name} has {layers} layers; take at most {layers}, or true for all"
        )


def compiles_layers(train: TrainConfig, stage: int) -> bool:
    """Tell whether layers are compiled; not on a rung of ZeRO 3 to which a run fell back."""
    return train.compile is Compile.layers and stage < 3


def check_compile(train: TrainConfig, stage: int, in_4_bits: bool) -> None:
    """Refuse to compile layers where the compiler cannot see them whole.

    Args:
        in_4_bits: The tuner keeps weights in 4 bits.

    Raises:
        ConfigError: With what to take instead.
    """
    if train.compile is Compile.none:
        return
    if stage == 3:
        raise ConfigError(
            "train.compile=layers: ZeRO 3 gathers the weights of every module from Python, which"
            " no graph can hold; take zero=2 where the weights fit, or train.compile=none"
        )
    if in_4_bits:
        raise ConfigError(
            "train.compile=layers: weights in 4 bits are computed with by functions of"
            " bitsandbytes, which were not tried with the compiler; take train.compile=none"
        )


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
        ConfigError: The architecture lacks the kernel asked for, or the GPU does.
    """
    kernel = config.model.attn_implementation
    # FlashAttention's kernels are for 16 bits, and for Ampere and later. They skip what SDPA masks:
    # the attention between the documents of a packed row.
    can_flash = (
        config.precision is not Precision.fp32 and not 0 < compute_capability < FIRST_WITH_BF16
    )
    if kernel != "auto":
        check_kernel(kernel, kernels, config.model.name_or_path)
        if kernel == VARLEN and accelerator == "cuda" and not can_flash:
            raise ConfigError(
                f"model.attn_implementation={VARLEN}: its kernel on a GPU is for 16 bits, and for"
                f" compute capability 8.0 and later (precision={config.precision.value}); take"
                " model.attn_implementation=auto or sdpa"
            )
        return kernel
    packed = config.data.packing and "flash_attention_2" in kernels
    if accelerator == "cuda" and can_flash and packed and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    if VARLEN in kernels and (can_flash or accelerator != "cuda"):
        return VARLEN
    short = accelerator == "cpu" and config.data.max_seq_length <= SHORT_ROW_TOKENS
    return "eager" if short or "sdpa" not in kernels else "sdpa"


#: The package behind ``model.kernels=liger``, as it is imported.
LIGER = "liger_kernel"


def resolve_kernels(asked: Kernels, accelerator: str, in_fp32: bool) -> Kernels:
    """Return the elementwise kernels of a run: those asked for, or the fastest here.

    On a CPU torch's were faster in fp32 alone, and there for LoRA alone
    (``scripts/bench/kernels.py``, docs/speed.md).

    Args:
        asked: ``model.kernels``.
        accelerator: ``cuda``, ``cpu`` or another name of DeepSpeed's.
        in_fp32: The model is trained in fp32.
    """
    if asked is not Kernels.auto:
        return asked
    if accelerator == "cpu":
        return Kernels.torch if in_fp32 else Kernels.none
    has_liger = accelerator == "cuda" and importlib.util.find_spec(LIGER) is not None
    return Kernels.liger if has_liger else Kernels.torch


def check_kernels(asked: Kernels, accelerator: str) -> None:
    """Refuse Liger's kernels where they cannot run.

    Raises:
        ConfigError: There is no NVIDIA GPU.
        MissingPrerequisiteError: The package is missing.
    """
    if asked is not Kernels.liger:
        return
    if accelerator != "cuda":
        raise ConfigError(
            f"model.kernels=liger: Liger's kernels are for NVIDIA GPUs, and this run is on"
            f" {accelerator}; take model.kernels=auto"
        )
    if importlib.util.find_spec(LIGER) is None:
        raise MissingPrerequisiteError(
            "model.kernels=liger: the package liger-kernel is not installed; pip install"
            " liger-kernel, or take model.kernels=auto"
        )


def describe_kernels(asked: Kernels, accelerator: str, in_fp32: bool) -> str:
    """Say which elementwise kernels are taken and why; empty for ``none``, and for a CPU's own.

    Each run says before step 1 what was replaced.
    """
    kernels = resolve_kernels(asked, accelerator, in_fp32)
    if kernels is Kernels.none or (asked is Kernels.auto and accelerator == "cpu"):
        return ""
    origin = "model.kernels"
    if asked is Kernels.auto:
        installed = "installed" if kernels is Kernels.liger else "not installed"
        origin = f"auto: liger-kernel is {installed}" if accelerator == "cuda" else "auto"
    return f"elementwise kernels: {kernels.value} ({origin})"
