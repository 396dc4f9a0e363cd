"""The interface of a tuner, and the registry of tuners."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from llmtune.config.groups.export import MergeOnto
from llmtune.config.groups.tuner import TunerConfig
from llmtune.registry import Registry
from llmtune.tuner.head import NO_HEAD, Head, in_modules
from llmtune.tuner.lora_settings import find_setting_problems
from llmtune.tuner.token_rows.settings import find_token_problems
from llmtune.tuner.whole_parameters import Gather, keep_whole

if TYPE_CHECKING:
    from llmtune.tuner.adapted_layers import AdaptedLayers
    from llmtune.tuner.token_rows.settings import TokenTable


#: Keys of ``tuner`` that only adapters read. Those of rank and scale may stand in a shared
#: experiment for every tuner.
_ADAPTER_KEYS = (
    "use_dora",
    "lora_plus_ratio",
    "init_lora_weights",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "modules_to_save",
    "trainable_token_indices",
    "bias",
)


class Tuner:
    """A way to train: its parameters, how they are attached, and its result.

    The methods here describe a tuner that trains parameters of the model itself. A tuner with
    adapters (:class:`llmtune.tuner.kinds.lora.LoraTuner`) overrides more of them.
    """

    name: ClassVar[str]
    """Its value of ``tuner.kind``."""
    title: ClassVar[str]
    """Its name in texts."""
    has_adapter: ClassVar[bool] = False
    """The result is an adapter for an unchanged base, not a full model."""
    trains_all: ClassVar[bool] = False
    """Every parameter of the model is trained, so that its optimizer states are large."""
    reads_freeze: ClassVar[bool] = False
    """``tuner.freeze`` chooses the parameters that it trains."""
    is_quantized: ClassVar[bool] = False
    """The model's linear layers are kept in 4 bits (NF4).

    :func:`llmtune.tuner.quantized_layers.find_quantized_layers` says which.
    """
    learning_rates: ClassVar[Sequence[tuple[float, float]]]
    """(Upper limit of the model's parameters, peak learning rate), smallest first."""

    def find_problems(self, config: TunerConfig) -> list[str]:
        """Find broken rules of ``tuner.*``, in words a user can act on."""
        problems = [*find_setting_problems(config), *find_token_problems(config)]
        if config.adapter_path and not self.has_adapter:
            problems.append(
                f"tuner.adapter_path={config.adapter_path} needs tuner=lora; {self.title} has no"
                " adapter"
            )
        if config.new_tokens and not (self.has_adapter or self.trains_all):
            problems.append(
                f"tuner.new_tokens={config.new_tokens} needs tuner=lora or tuner=full;"
                f" {self.title} trains no single rows of embeddings"
            )
        if not config.bnb_4bit_use_double_quant and not self.is_quantized:
            problems.append(
                f"tuner.bnb_4bit_use_double_quant=false needs tuner=qlora; {self.title} has no"
                " weights in 4 bits"
            )
        if not self.has_adapter:
            defaults = TunerConfig(kind=config.kind)
            problems += [
                f"tuner.{key}={getattr(config, key)} needs tuner=lora; {self.title} has no adapter"
                for key in _ADAPTER_KEYS
                if getattr(config, key) != getattr(defaults, key)
            ]
        if not self.reads_freeze:
            problems += [
                f"tuner.freeze.{key}={value} needs tuner=freeze; {self.title} does not read it"
                for key, value in asdict(config.freeze).items()
                if value is not None
            ]
        return problems

    def needs_4_bits(self, config: TunerConfig) -> bool:
        """Tell whether the adapter fits the base in 4 bits, and not the unquantized one."""
        return False

    def find_merge_problem(self, config: TunerConfig, onto: MergeOnto) -> str | None:
        """Find why an adapter of this tuner does not fit the base that it would be merged onto."""
        return None

    def choose_layers(
        self, model: Any, config: TunerConfig, head: Sequence[str] = ()
    ) -> AdaptedLayers | None:
        """Choose the layers that get adapters; None for a tuner without adapters.

        Args:
            model: A transformers model, on any device.
            head: Names of the modules that are the task's head; they are trained themselves.

        Raises:
            ConfigError: No layer is chosen, or a chosen one cannot have an adapter.
        """
        return None

    def trains(self, name: str, parameter: Any) -> bool:
        """Tell whether a parameter of the model itself is trained."""
        return self.trains_all

    def choose_parameters(self, model: Any, config: TunerConfig) -> Collection[str]:
        """Choose the trained parameters of the model itself, by :meth:`trains`.

        Args:
            model: A transformers model, on any device, under ZeRO 3 with slices of its parameters.

        Returns:
            Their names, as ``named_parameters`` gives them.

        Raises:
            ConfigError: The model has none that the config names.
        """
        return {
            name for name, parameter in model.named_parameters() if self.trains(name, parameter)
        }

    def find_token_tables(self, model: Any, config: TunerConfig) -> Sequence[TokenTable]:
        """Find the tables of which single rows are trained, beside adapters.

        Args:
            model: A transformers model, on any device, under ZeRO 3 with slices of its parameters.

        Raises:
            ConfigError: The model has no such row, or trains it otherwise too.
        """
        return ()

    def find_rate_factor(self, name: str, config: TunerConfig) -> tuple[str, float] | None:
        """Find a factor of the peak learning rate of one trained parameter.

        Args:
            name: As in :func:`llmtune.optimizer.param_groups.plain_name`.

        Returns:
            The dotted key that sets the factor, and the factor; None where there is none.
        """
        return None

    def attach(
        self,
        model: Any,
        config: TunerConfig,
        base: str,
        seed: int,
        head: Head = NO_HEAD,
        gather: Gather = keep_whole,
    ) -> Any:
        """Mark the trained parameters, and add adapters.

        Args:
            model: The model with its weights, under ZeRO 3 with this rank's slices of them.
            base: The base model's name in the adapter's settings.
            seed: The run's seed; adapters of equal seeds begin equal.
            head: The task's head, which every tuner trains.
            gather: Makes weights of the model whole while their values are looked at.

        Returns:
            The model that is trained.
        """
        mark_trained(self, model, config, head.modules)
        return model

    def find_read_elsewhere(self, model: Any) -> Iterable[tuple[Any, Any]]:
        """Find modules that read, in their forward pass, a parameter of another module.

        ZeRO 3 gathers a parameter for its own module only, unless it is told of others.

        Args:
            model: What :meth:`attach` returned.

        Returns:
            Such modules, each with a parameter.
        """
        return ()

    def import_libraries(self) -> None:
        """Import the slow libraries of :meth:`attach` ahead of it."""

    def describe(self, config: TunerConfig) -> str:
        """Describe the tuner in a phrase, for the plan and for messages."""
        return self.title


def find_trained(
    tuner: Tuner, model: Any, config: TunerConfig, head: Sequence[str] = ()
) -> set[str]:
    """Name the parameters of the model itself that are trained: by the tuner, or as the head's.

    Args:
        head: Names of the modules that are the task's head.

    Raises:
        ConfigError: The model has none of the parameters that ``tuner.*`` names.
    """
    chosen = tuner.choose_parameters(model, config)
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (name in chosen or in_modules(name, head))
    }


def mark_trained(tuner: Tuner, model: Any, config: TunerConfig, head: Sequence[str] = ()) -> None:
    """Freeze every parameter of the model that neither the tuner nor the task trains.

    What the architecture itself freezes stays frozen, such as the biases by which AFMoE and
    ERNIE 4.5 balance their experts.

    Args:
        head: Names of the modules that are the task's head.
    """
    trained = find_trained(tuner, model, config, head)
    for name, parameter in model.named_parameters():
        if name not in trained:
            parameter.requires_grad_(False)


TUNERS: Registry[Tuner] = Registry("tuner.kind", "llmtune.tuner.kinds", interface=Tuner)
