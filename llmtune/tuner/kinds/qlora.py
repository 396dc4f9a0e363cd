"""QLoRA: LoRA on a model whose matrices are kept in 4 bits (https://arxiv.org/abs/2305.14314)."""

from __future__ import annotations

from llmtune.tuner.kinds.lora import LoraTuner
from llmtune.tuner.tuner import TUNERS


class QloraTuner(LoraTuner):
    """Train adapters on a model whose linear layers are kept in NF4."""

    name = "qlora"
    title = "QLoRA"
    is_quantized = True


TUNERS.register(QloraTuner())
