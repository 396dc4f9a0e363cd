"""QLoRA: LoRA on a model whose matrices are kept in 4 bits (https://arxiv.org/abs/2305.14314)."""

from __future__ import annotations

from typing import Any

from llmtune.config.groups.tuner import TunerConfig
from llmtune.tuner.head import NO_HEAD, Head
from llmtune.tuner.kinds.lora import LoraTuner
from llmtune.tuner.lora_settings import changes_base
from llmtune.tuner.tuner import TUNERS
from llmtune.tuner.whole_parameters import Gather, keep_whole


class QloraTuner(LoraTuner):
    """Train adapters on a model whose linear layers are kept in NF4."""

    name = "qlora"
    title = "QLoRA"
    is_quantized = True

    def attach(
        self,
        model: Any,
        config: TunerConfig,
        base: str,
        seed: int,
        head: Head = NO_HEAD,
        gather: Gather = keep_whole,
    ) -> Any:
        """Add peft's adapters."""
        wrapped = super().attach(model, config, base, seed, head, gather)
        # GPT-2's files hold (inputs, outputs). Its layers in 4 bits do not, and peft reads the
        # layers; who merges the adapter needs to know what the files hold.
        if any(getattr(module, "transposed", False) for module in model.modules()):
            wrapped.peft_config["default"].fan_in_fan_out = True
        return wrapped

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
