"""Which layers get LoRA adapters: those that peft adapts, that are called as layers, and that do
not choose among experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.errors import ConfigError

if TYPE_CHECKING:
    from llmtune.config.groups.tuner import TunerConfig

#: Of a state-space layer (Mamba's), which hands their weights to its kernel instead of calling
#: them: adapters would be passed by.
_HANDED_OVER = ("x_proj", "dt_proj", "out_proj")


@dataclass(frozen=True, slots=True)
class AdaptedLayers:
    """The layers of a model that get adapters, and what is left alone."""

    layers: dict[str, Any]
    """Path -> linear layer."""
    left_alone: dict[str, str]
    """Path of a linear layer that cannot or must not have an adapter -> why."""
    patterned: bool
    """Whether peft must be told the names of layers instead of ``all-linear``."""

    @property
    def endings(self) -> list[str]:
        """The last parts of their names."""
        return sorted({name.rsplit(".", 1)[-1] for name in self.layers})

    def peft_settings(self, wanted: Any) -> dict[str, Any]:
        """``target_modules`` and ``exclude_modules`` of peft's configuration.

        Args:
            wanted: ``tuner.target_modules``.
        """
        if not self.patterned:
            return {"target_modules": wanted if isinstance(wanted, str) else list(wanted)}
        endings = self.endings
        excluded = sorted(name for name in self.left_alone if name.rsplit(".", 1)[-1] in endings)
        return {"target_modules": endings, "exclude_modules": excluded or None}


def choose_layers(model: Any, tuner: TunerConfig) -> AdaptedLayers:
    """The linear layers that the tuner adapts.

    Args:
        model: Of transformers, on any device.

    Raises:
        ConfigError: ``tuner.target_modules`` matches nothing, or layers that cannot have adapters.
    """
    linear = linear_layers(model)
    head = model.get_output_embeddings()
    left_alone = _left_alone(model, linear)
    if tuner.target_modules == "all-linear":
        layers = {
            name: one for name, one in linear.items() if one is not head and name not in left_alone
        }
        return AdaptedLayers(
            layers, left_alone, patterned=bool(left_alone) or _has_stacked_experts(model)
        )
    endings = list(tuner.target_modules)
    matched = {e: [n for n in linear if n == e or n.endswith(f".{e}")] for e in endings}
    nothing = [ending for ending in endings if not matched[ending]]
    if nothing:
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ConfigError(
            f"tuner.target_modules: {nothing} matches no linear layer; the model has {known}"
        )
    impossible = {
        e: left_alone[n] for e, names in matched.items() for n in names if n in left_alone
    }
    if impossible:
        ending, reason = next(iter(impossible.items()))
        free = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, one in linear.items()
                if name not in left_alone and one is not head
            }
        )
        raise ConfigError(
            f"tuner.target_modules: {ending} cannot have an adapter: {reason}; the others are"
            f" {free}"
        )
    chosen = {name for names in matched.values() for name in names}
    return AdaptedLayers(
        {name: one for name, one in linear.items() if name in chosen}, left_alone, patterned=False
    )


def linear_layers(model: Any) -> dict[str, Any]:
    """What peft takes for linear layers; GPT-2's are called ``Conv1D``, and have their weight
    transposed.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def matrix_sides(linear: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    from torch import nn

    shape = linear.weight.shape
    return (
        (int(shape[1]), int(shape[0]))
        if isinstance(linear, nn.Linear)
        else (int(shape[0]), int(shape[1]))
    )


def count_experts(architecture: Any) -> int:
    """Experts of a layer, of which each token takes a few; 0 for a dense model."""
    text = architecture.get_text_config()
    keys = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    places = [text, getattr(text, "ffn_config", None)]
    return next(
        (int(number) for place in places for key in keys if (number := getattr(place, key, None))),
        0,
    )


def stacked_parameters(model: Any) -> int:
    """Elements of experts that are stacked in one tensor, which is no linear layer."""
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if ".experts." in name and len(_shape(p)) > 2
    )


def _has_stacked_experts(model: Any) -> bool:
    return any(".experts." in name and len(_shape(p)) > 2 for name, p in model.named_parameters())


def _shape(parameter: Any) -> Any:
    """Also of a parameter of which ZeRO 3 keeps a slice."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _left_alone(model: Any, linear: dict[str, Any]) -> dict[str, str]:
    experts = count_experts(model.config)
    taken = _taken_for_experts(model)
    found = {}
    for name, layer in linear.items():
        owner, _, ending = name.rpartition(".")
        if _is_router(name, layer, experts):
            found[name] = (
                "it chooses among the experts, and an adapter would change who answers instead of"
                " what"
            )
        elif ending in taken:
            found[name] = (
                "peft takes its name for that of the stacked experts, and would adapt those instead"
            )
        elif ending in _HANDED_OVER and _is_state_space(model.get_submodule(owner)):
            found[name] = (
                "its layer hands the weight to a kernel instead of calling it, and an adapter would"
                " be passed by"
            )
    return found


def _is_router(name: str, linear: Any, experts: int) -> bool:
    """Whether a layer chooses the experts of a mixture, or weighs the one that all tokens share."""
    parts = name.split(".")
    gate = parts[-1].endswith("gate") and getattr(linear, "out_features", None) in (1, experts)
    return experts > 0 and (any(part.endswith("router") for part in parts) or gate)


def _is_state_space(module: Any) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return "A_log" in own and "D" in own


def _taken_for_experts(model: Any) -> set[str]:
    """Names of layers that peft maps to stacked experts, as they were called before transformers
    stacked them.

    It does so whatever layer has the name, a dense or a shared one too, in training and whenever
    such an adapter is loaded.
    """
    if not _has_stacked_experts(model):
        return set()
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return set()
    family = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {}).get(model.config.model_type)
    return set(getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {}).get(family, {}))
