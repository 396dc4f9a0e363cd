"""QLoRA: LoRA on a model whose matrices are kept in 4 bits (https://arxiv.org/abs/2305.14314)."""

from __future__ import annotations

from llmtune.config.groups.tuner import TunerConfig
from llmtune.tuner.kinds.lora import LoraTuner
from llmtune.tuner.lora_settings import changes_base
from llmtune.tuner.tuner import TUNERS


class QloraTuner(LoraTuner):
    """Train adapters on a model whose linear layers are kept in NF4."""

    name = "qlora"
    title = "QLoRA"
    is_quantized = True

    def find_problems(self, config: TunerConfig) -> list[str]:
        """Find what reads or changes whole weights, which a base in 4 bits does not have."""
        problems = super().find_problems(config)
        if config.use_dora:
            problems.append(
                "tuner.use_dora=true with tuner=qlora: DoRA takes the lengths of whole weights in"
                " every forward pass; take tuner=dora, or leave it out"
            )
        if changes_base(config):
            problems.append(
                f"tuner.init_lora_weights={config.init_lora_weights} with tuner=qlora changes the"
                " base, which is quantized before; take tuner=lora, or leave it out"
            )
        return problems


TUNERS.register(QloraTuner())
