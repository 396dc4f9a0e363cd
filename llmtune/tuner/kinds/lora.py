"""LoRA: low-rank adapters on linear layers (https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, ClassVar

from llmtune.config.groups.tuner import TunerConfig
from llmtune.tuner.adapted_layers import AdaptedLayers, choose_layers, find_own_parameters
from llmtune.tuner.head import NO_HEAD, Head
from llmtune.tuner.lora_settings import LOFTQ
from llmtune.tuner.token_rows.settings import TokenTable
from llmtune.tuner.token_rows.tables import find_token_tables
from llmtune.tuner.tuner import TUNERS, Tuner
from llmtune.tuner.whole_parameters import Gather, keep_whole


class LoraTuner(Tuner):
    """Train adapters; the model itself stays unchanged."""

    name = "lora"
    title = "LoRA"
    has_adapter = True
    #: Published recipes use the larger two. The first was tried on SmolLM2-135M: held-out loss
    #: after 56 steps is 2.84 at 5e-4 and 2.78 at 1e-3.
    learning_rates: ClassVar = [(1e9, 1e-3), (20e9, 2e-4), (float("inf"), 1e-4)]

    def find_problems(self, config: TunerConfig) -> list[str]:
        """Find broken rules of ``tuner.*``, and a start that only a base in 4 bits has."""
        problems = super().find_problems(config)
        if config.init_lora_weights == LOFTQ and not self.is_quantized:
            problems.append(
                f"tuner.init_lora_weights={LOFTQ} needs tuner=qlora: it begins with what the"
                " quantization to 4 bits takes from the base"
            )
        return problems

    def choose_layers(
        self, model: Any, config: TunerConfig, head: Sequence[str] = ()
    ) -> AdaptedLayers:
        """Choose the linear layers that ``tuner.target_modules`` names."""
        return choose_layers(model, config, head)

    def choose_parameters(self, model: Any, config: TunerConfig) -> Collection[str]:
        """Choose the parameters of ``tuner.modules_to_save`` and ``tuner.bias``."""
        if not config.modules_to_save and config.bias == "none":
            return ()
        return find_own_parameters(model, config, choose_layers(model, config))

    def find_token_tables(self, model: Any, config: TunerConfig) -> Sequence[TokenTable]:
        """Find the tables of ``tuner.trainable_token_indices`` and ``tuner.new_tokens``."""
        return find_token_tables(model, config)

    def find_rate_factor(self, name: str, config: TunerConfig) -> tuple[str, float] | None:
        """Give the matrices B a learning rate of their own: LoRA+.

        See https://arxiv.org/abs/2402.12354.
        """
        if config.lora_plus_ratio is None or ".lora_B." not in name:
            return None
        return "tuner.lora_plus_ratio", config.lora_plus_ratio

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
        from llmtune.tuner.peft_model import add_lora

        return add_lora(model, config, base, seed, head, gather)

    def find_read_elsewhere(self, model: Any) -> Iterable[tuple[Any, Any]]:
        """Find the layers of DoRA, which take the base's lengths, and those of tied token rows."""
        from llmtune.tuner.peft_model import find_read_elsewhere

        return find_read_elsewhere(model)

    def import_libraries(self) -> None:
        """Import peft."""
        from llmtune.tuner.peft_model import import_peft

        import_peft()

    def describe(self, config: TunerConfig) -> str:
        """Describe the tuner with its rank, and with what differs from plain LoRA."""
        kinds = ("DoRA", config.use_dora), ("rsLoRA", config.use_rslora)
        names = [name for name, is_used in kinds if is_used]
        if config.lora_plus_ratio is not None:
            names.append(f"LoRA+ {config.lora_plus_ratio:g}")
        if config.init_lora_weights != "default":
            names.append(f"begun as {config.init_lora_weights}")
        text = f"{self.title} r={config.lora_r}"
        return f"{text} ({', '.join(names)})" if names else text


TUNERS.register(LoraTuner())
