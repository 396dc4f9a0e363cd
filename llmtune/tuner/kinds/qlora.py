"""QLoRA: LoRA on a model whose matrices are kept in 4 bits (https://arxiv.org/abs/2305.14314)."""

from __future__ import annotations

from llmtune.config.groups.export import MergeOnto
from llmtune.config.groups.tuner import TunerConfig
from llmtune.tuner.kinds.lora import LoraTuner
from llmtune.tuner.lora_settings import LOFTQ, changes_base
from llmtune.tuner.tuner import TUNERS


class QloraTuner(LoraTuner):
    """Train adapters on a model whose linear layers are kept in NF4."""

    name = "qlora"
    title = "QLoRA"
    is_quantized = True

    def needs_4_bits(self, config: TunerConfig) -> bool:
        """Tell whether the adapter holds what the quantization took from the base (LoftQ)."""
        return config.init_lora_weights == LOFTQ

    def find_merge_problem(self, config: TunerConfig, onto: MergeOnto) -> str | None:
        """Find that an adapter was begun for the other of the two bases."""
        start = f"tuner.init_lora_weights={config.init_lora_weights}"
        if self.needs_4_bits(config) and onto is MergeOnto.original:
            return (
                f"export.merge_onto=original with {start}: the adapter makes up for what the"
                " quantization took from the base, and the unquantized one still has it; take"
                " export.merge_onto=nf4, or export=adapter"
            )
        if changes_base(config) and onto is MergeOnto.nf4:
            return (
                f"export.merge_onto=nf4 with {start}: the training quantized what the adapter left"
                " of the base, and not the base; take export.merge_onto=original"
            )
        return None


TUNERS.register(QloraTuner())
