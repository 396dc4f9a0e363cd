"""QLoRA: LoRA on a model whose matrices are kept in 4 bits (https://arxiv.org/abs/2305.14314)."""

from __future__ import annotations

from llmtune.tuner.kinds.lora import LoraTuner
from llmtune.tuner.tuner import TUNERS


class QloraTuner(LoraTuner):
    """Train adapters on a model in 4 bits; it can be planned and not trained yet."""

    name = "qlora"
    title = "QLoRA"
    is_quantized = True
    not_trained_yet = "tuner=lora"


TUNERS.register(QloraTuner())
