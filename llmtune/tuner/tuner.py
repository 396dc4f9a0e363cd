"""What the program asks of a tuner, and which tuners there are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from llmtune.config.groups.tuner import TunerConfig
from llmtune.registry import Registry
from llmtune.tuner.lora_settings import find_setting_problems

if TYPE_CHECKING:
    from llmtune.tuner.adapted_layers import AdaptedLayers


class Tuner:
    """One way to train: which parameters, how they are attached, and what is left in the end.

    The methods here describe a tuner that trains parameters of the model itself. A tuner with
    adapters (:class:`llmtune.tuner.kinds.lora.LoraTuner`) overrides more of them.
    """

    name: ClassVar[str]
    """As ``tuner.kind`` takes it."""
    title: ClassVar[str]
    """What people call it."""
    has_adapter: ClassVar[bool] = False
    """The result is an adapter beside an unchanged base, and not a whole model."""
    trains_all: ClassVar[bool] = False
    """Every parameter of the model is trained, so that its optimizer states are large."""
    is_quantized: ClassVar[bool] = False
    """Linear layers of the model, but for the head, are kept in 4 bits (NF4)."""
    not_trained_yet: ClassVar[str | None] = None
    """What to take instead, for a tuner that can be planned and not trained."""
    learning_rates: ClassVar[Sequence[tuple[float, float]]]
    """(Parameters of the model below which it holds, peak learning rate), smallest first."""

    def find_problems(self, config: TunerConfig) -> list[str]:
        """Broken rules of ``tuner.*``, in words a user can act on."""
        problems = find_setting_problems(config)
        if config.adapter_path and not self.has_adapter:
            problems.append(
                f"tuner.adapter_path={config.adapter_path} needs tuner=lora; {self.title} has no"
                " adapter"
            )
        return problems

    def choose_layers(self, model: Any, config: TunerConfig) -> AdaptedLayers | None:
        """The layers that get adapters; None for a tuner without adapters.

        Args:
            model: Of transformers, on any device.

        Raises:
            ConfigError: No layer is chosen, or one that cannot have an adapter.
        """
        return None

    def trains(self, name: str, parameter: Any) -> bool:
        """Whether a parameter of the model itself is trained."""
        return self.trains_all

    def attach(self, model: Any, config: TunerConfig, base: str, seed: int) -> Any:
        """Mark what is trained, and add adapters.

        Args:
            model: The model with its weights, under ZeRO 3 with this rank's slices of them.
            base: What the adapter's settings name as the base model.
            seed: Of the run; adapters of equal seeds begin equal.

        Returns:
            The model that is trained.
        """
        mark_trained(self, model)
        return model

    def import_libraries(self) -> None:
        """Import what :meth:`attach` takes seconds to import, ahead of it."""

    def describe(self, config: TunerConfig) -> str:
        """One phrase for the plan and for messages."""
        return self.title


def mark_trained(tuner: Tuner, model: Any) -> None:
    """Freeze every parameter of the model that the tuner does not train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tuner.trains(name, parameter))


TUNERS: Registry[Tuner] = Registry("tuner.kind", "llmtune.tuner.kinds")
