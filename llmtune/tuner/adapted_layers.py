"""Choose the layers that get LoRA adapters.

These are the linear layers that peft adapts, that are called as layers, and that do not choose
among experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.errors import ConfigError
from llmtune.tuner.head import in_modules

if TYPE_CHECKING:
    from llmtune.config.groups.tuner import TunerConfig

#: Linear layers of a state-space layer (Mamba's) that passes their weights to its kernel instead of
#: calling them; adapters on them would have no effect.
_USED_BY_KERNEL = ("x_proj", "dt_proj", "out_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedLayers:
    """The layers of a model that get adapters, and those that do not."""

    layers: dict[str, Any]
    """Path -> linear layer."""
    left_alone: dict[str, str]
    """Path of a linear layer that cannot or must not have an adapter -> the reason."""
    patterned: bool
    """peft must be given the names of layers instead of ``all-linear``."""
    head: tuple[str, ...] = ()
    """Paths of the head's linear layers, which are trained themselves."""

    @property
    def endings(self) -> list[str]:
        """Return the last parts of the adapted layers' names."""
        return _last_parts(self.layers)

    @property
    def left_alone_endings(self) -> list[str]:
        """Return the last parts of the names of the layers that are left alone."""
        return _last_parts(self.left_alone)

    def peft_settings(self, targets: Any) -> dict[str, Any]:
        """Return ``target_modules`` and ``exclude_modules`` of peft's configuration.

        Args:
            targets: ``tuner.target_modules``.
        """
        names = [*self.left_alone, *self.head]
        if self.patterned:
            endings = self.endings
            excluded = sorted(name for name in names if name.rsplit(".", 1)[-1] in endings)
            return {"target_modules": endings, "exclude_modules": excluded or None}
        if isinstance(targets, str):
            return {"target_modules": targets}
        excluded = sorted(name for name in names if _is_named(name, targets))
        return {"target_modules": list(targets), "exclude_modules": excluded or None}


def choose_layers(model: Any, tuner: TunerConfig, head: Sequence[str] = ()) -> AdaptedLayers:
    """Choose the linear layers that the tuner adapts.

    Args:
        model: A transformers model, on any device.
        head: Names of the modules that are the task's head, which is trained without an adapter.

    Raises:
        ConfigError: ``tuner.target_modules`` matches nothing, or layers that cannot have adapters.
    """
    every = linear_layers(model)
    of_head = tuple(name for name in every if in_modules(name, head))
    linear = {name: layer for name, layer in every.items() if name not in of_head}
    output = model.get_output_embeddings()
    left_alone = _left_alone(model, linear)
    targets = tuner.target_modules
    if targets == "all-linear":
        layers = {
            name: layer
            for name, layer in linear.items()
            if layer is not output and name not in left_alone
        }
        patterned = bool(left_alone or of_head) or _has_stacked_experts(model)
        return AdaptedLayers(
            layers=layers, left_alone=left_alone, patterned=patterned, head=of_head
        )

    # The layers whose names end with one of the targets.
    layers = {name: layer for name, layer in linear.items() if _is_named(name, targets)}
    unmatched = [
        target for target in targets if not any(_is_named(name, [target]) for name in layers)
    ]
    if unmatched:
        known = _last_parts(linear)
        raise ConfigError(
            f"tuner.target_modules: {unmatched} matches no linear layer; the model has {known}"
            + (" beside its head, which is trained without adapters" if of_head else "")
        )

    # Those that cannot have an adapter.
    for target in targets:
        for name, reason in left_alone.items():
            if _is_named(name, [target]):
                others = {
                    key for key in linear if key not in left_alone and linear[key] is not output
                }
                raise ConfigError(
                    f"tuner.target_modules: {target} cannot have an adapter: {reason}; the others"
                    f" are {_last_parts(others)}"
                )
    return AdaptedLayers(layers=layers, left_alone=left_alone, patterned=False, head=of_head)


def _is_named(layer: str, targets: Iterable[str]) -> bool:
    """Tell whether a layer's name ends with one of the targets, as peft asks it."""
    return any(f".{layer}".endswith(f".{target}") for target in targets)


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def linear_layers(model: Any) -> dict[str, Any]:
    """Return the layers that peft treats as linear, by name.

    GPT-2's are called ``Conv1D``, and have a transposed weight.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def matrix_sides(linear: Any) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer."""
    from torch import nn

    rows, columns = (int(side) for side in linear.weight.shape)
    return (columns, rows) if isinstance(linear, nn.Linear) else (rows, columns)


def count_experts(architecture: Any) -> int:
    """Read the number of a layer's experts from a configuration; 0 for a dense model."""
    text = architecture.get_text_config()
    for section in (text, getattr(text, "ffn_config", None)):
        for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
            if experts := getattr(section, key, None):
                return int(experts)
    return 0


def stacked_parameters(model: Any) -> int:
    """Count the elements of experts that are stacked in one tensor, which is not a linear layer."""
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if ".experts." in name and len(_shape(p)) > 2
    )


def _has_stacked_experts(model: Any) -> bool:
    return any(".experts." in name and len(_shape(p)) > 2 for name, p in model.named_parameters())


def _shape(parameter: Any) -> Any:
    """Return the shape of a parameter, also where ZeRO 3 keeps a slice of it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _left_alone(model: Any, linear: dict[str, Any]) -> dict[str, str]:
    experts = count_experts(model.config)
    expert_names = _taken_for_experts(model)
    reasons = {}
    for name, layer in linear.items():
        owner, _, ending = name.rpartition(".")
        if _is_router(name, layer, experts):
            reasons[name] = (
                "it chooses among the experts, and an adapter would change which experts are used"
            )
        elif ending in expert_names:
            reasons[name] = (
                "peft treats its name as that of the stacked experts, and would adapt those instead"
            )
        elif ending in _USED_BY_KERNEL and _is_state_space(model.get_submodule(owner)):
            reasons[name] = (
                "its layer passes the weight to a kernel instead of calling it, so that an adapter"
                " would have no effect"
            )
    return reasons


def _is_router(name: str, linear: Any, experts: int) -> bool:
    """Tell whether a layer chooses the experts, or weighs the one that all tokens share."""
    parts = name.split(".")
    gate = parts[-1].endswith("gate") and getattr(linear, "out_features", None) in (1, experts)
    return experts > 0 and (any(part.endswith("router") for part in parts) or gate)


def _is_state_space(module: Any) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return "A_log" in own and "D" in own


def _taken_for_experts(model: Any) -> set[str]:
    """Return the names of layers that peft maps to stacked experts: those before the stacking.

    peft maps every layer of that name, dense or shared ones too, in training and whenever such an
    adapter is loaded.
    """
    if not _has_stacked_experts(model):
        return set()
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return set()
    family = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {}).get(model.config.model_type)
    return set(getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {}).get(family, {}))
