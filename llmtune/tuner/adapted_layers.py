"""Choose the layers that get LoRA adapters.

These are the linear layers that peft adapts, that are called as layers, and that do not choose
among experts; and the stacks of experts that are named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmtune.errors import ConfigError
from llmtune.tuner.blocks import find_blocks
from llmtune.tuner.head import in_modules
from llmtune.tuner.stacks.stacked_weights import (
    Stack,
    choose_stacks,
    count_experts,
    find_stacks,
)

if TYPE_CHECKING:
    from llmtune.config.groups.tuner import TunerConfig

_CHOOSES_EXPERTS = (
    "it chooses among the experts, and an adapter would change which experts are used"
)

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
    """Paths of the linear layers that are trained themselves: the head's, and saved modules'."""
    is_exact: bool = False
    """peft must be given whole names, because endings name other layers too."""
    stacks: dict[str, Stack] = field(default_factory=dict)
    """Name of a parameter -> stack of experts' matrices that gets an adapter."""

    @property
    def endings(self) -> list[str]:
        """Return the last parts of the adapted layers' names."""
        return _last_parts(self.layers)

    @property
    def all_endings(self) -> list[str]:
        """Return the last parts of the names of everything that gets adapters."""
        return _last_parts([*self.layers, *self.stacks])

    @property
    def left_alone_endings(self) -> list[str]:
        """Return the last parts of the names of the layers that are left alone."""
        return _last_parts(self.left_alone)

    def peft_settings(self, targets: Any, parameters: Sequence[str]) -> dict[str, Any]:
        """Return the settings of peft's configuration that name layers and parameters.

        Args:
            targets: ``tuner.target_modules``.
            parameters: ``tuner.target_parameters``.
        """
        settings = self._module_settings(targets)
        if self.stacks:
            # peft does not look at the number of a layer here.
            names = list(self.stacks) if self.is_exact else list(parameters)
            settings["target_parameters"] = names
        return settings

    def _module_settings(self, targets: Any) -> dict[str, Any]:
        if self.is_exact:
            return {"target_modules": list(self.layers)}
        names = [*self.left_alone, *self.head]
        if self.patterned:
            endings = self.endings
            excluded = sorted(name for name in names if name.rsplit(".", 1)[-1] in endings)
            return {"target_modules": endings, "exclude_modules": excluded or None}
        if isinstance(targets, str):
            return {"target_modules": targets}
        excluded = sorted(
            name for name in names if name not in self.layers and is_named(name, targets)
        )
        return {"target_modules": list(targets), "exclude_modules": excluded or None}


def choose_layers(model: Any, tuner: TunerConfig, head: Sequence[str] = ()) -> AdaptedLayers:
    """Choose the linear layers, and the stacks of experts, that the tuner adapts.

    Args:
        model: A transformers model, on any device.
        head: Names of the modules that are the task's head, which is trained without an adapter.

    Raises:
        ConfigError: A key of ``tuner`` matches nothing, or layers that cannot have adapters.
    """
    every = linear_layers(model)
    whole = [*head, *find_saved_modules(model, tuner)]
    of_head = tuple(name for name in every if in_modules(name, whole))
    linear = {name: layer for name, layer in every.items() if name not in of_head}
    output = model.get_output_embeddings()
    left_alone = _left_alone(model, linear)
    if tuner.target_modules == "all-linear":
        layers = {
            name: layer
            for name, layer in linear.items()
            if layer is not output and name not in left_alone
        }
    else:
        layers = _choose_named(linear, left_alone, tuner.target_modules, bool(of_head), output)
        left_alone = {name: reason for name, reason in left_alone.items() if name not in layers}
    stacks = choose_stacks(model, tuner, whole)
    kept = _narrow(model, layers, tuner)
    if not kept and not stacks:
        raise _nothing_left(tuner)
    patterned = tuner.target_modules == "all-linear" and (
        bool(left_alone or of_head) or bool(find_stacks(model))
    )
    return AdaptedLayers(
        layers=kept,
        left_alone=left_alone,
        patterned=patterned,
        head=of_head,
        is_exact=bool(tuner.layers_to_transform)
        or len(kept) < len(layers)
        or is_pattern(tuner.target_modules),
        stacks=stacks,
    )


def _choose_named(
    linear: dict[str, Any], left_alone: dict[str, str], targets: Any, has_head: bool, output: Any
) -> dict[str, Any]:
    """Return the layers that ``tuner.target_modules`` names.

    A router is among them where it is called as a layer.

    Raises:
        ConfigError: A name matches nothing, or a layer that cannot have an adapter.
    """
    layers = {name: layer for name, layer in linear.items() if is_named(name, targets)}
    unmatched = [
        _shown(target)
        for target in _each(targets)
        if not any(is_named(name, target) for name in layers)
    ]
    if unmatched:
        known = _last_parts(linear)
        raise ConfigError(
            f"tuner.target_modules: {unmatched} matches no linear layer; the model has {known}"
            + (" beside its head, which is trained without adapters" if has_head else "")
        )

    # Those that cannot have an adapter.
    for target in _each(targets):
        for name, reason in left_alone.items():
            if is_named(name, target):
                if reason is _CHOOSES_EXPERTS and _is_called_plainly(layers[name]):
                    continue
                others = {
                    key for key in linear if key not in left_alone and linear[key] is not output
                }
                raise ConfigError(
                    f"tuner.target_modules: {_shown(target)} cannot have an adapter: {reason}; the"
                    f" others are {_last_parts(others)}"
                )
    return layers


def _narrow(model: Any, layers: dict[str, Any], tuner: TunerConfig) -> dict[str, Any]:
    """Leave out what ``exclude_modules`` and ``layers_to_transform`` leave out.

    Raises:
        ConfigError: They match nothing.
    """
    kept = layers
    if tuner.exclude_modules is not None:
        excluded = tuner.exclude_modules
        for target in _each(excluded):
            if not any(is_named(name, target) for name in layers):
                raise ConfigError(
                    f"tuner.exclude_modules: {_shown(target)} matches none of the layers that would"
                    f" have adapters: {_last_parts(layers)}"
                )
        kept = {name: layer for name, layer in kept.items() if not is_named(name, excluded)}
    if tuner.layers_to_transform:
        blocks = find_blocks(model)
        count = len(blocks.modules) if blocks is not None else 0
        if wrong := [index for index in tuner.layers_to_transform if index >= count]:
            raise ConfigError(
                f"tuner.layers_to_transform={tuner.layers_to_transform}: the model has {count}"
                f" layers, numbered from 0, and no layer {wrong[0]}"
            )
        assert blocks is not None
        paths = [blocks.path(index) for index in tuner.layers_to_transform]
        kept = {name: layer for name, layer in kept.items() if in_modules(name, paths)}
    return kept


def _nothing_left(tuner: TunerConfig) -> ConfigError:
    keys = [key for key in ("exclude_modules", "layers_to_transform") if getattr(tuner, key)]
    return ConfigError(
        f"tuner.{' and tuner.'.join(keys)} leave no layer of those that"
        f" tuner.target_modules={tuner.target_modules} names"
    )


def find_saved_modules(model: Any, tuner: TunerConfig) -> list[str]:
    """Return the paths of the modules whose names end with one of ``tuner.modules_to_save``.

    As for peft, an end need not begin behind a dot: ``norm`` names ``input_layernorm`` too.

    Raises:
        ConfigError: A name matches no module with parameters, or one whose weight is tied.
    """
    found: list[str] = []
    for ending in tuner.modules_to_save:
        paths = [
            name
            for name, module in model.named_modules()
            if name.endswith(ending) and next(module.parameters(), None) is not None
        ]
        if not paths:
            known = _last_parts(name for name, _ in model.named_modules() if name)
            raise ConfigError(
                f"tuner.modules_to_save: {ending} matches no module; the model has"
                f" {[name for name in known if not name.isdigit()]}"
            )
        found += paths
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        if len(tied) > 1 and any(in_modules(name, found) for name in tied):
            raise ConfigError(
                f"tuner.modules_to_save={tuner.modules_to_save}: {' and '.join(tied)} are one"
                " tensor, of which peft would train one copy and leave the other; take"
                " tuner.trainable_token_indices=[...] for rows of it, or tuner=full"
            )
    return found


def find_own_parameters(model: Any, tuner: TunerConfig, chosen: AdaptedLayers) -> set[str]:
    """Name the model's own parameters that are trained beside the adapters.

    These are those of ``tuner.modules_to_save``, and the biases of ``tuner.bias``.

    Raises:
        ConfigError: The model has none that a key names.
    """
    saved = find_saved_modules(model, tuner)
    names = [name for name, _ in model.named_parameters()]
    own = {name for name in names if in_modules(name, saved)}
    biases: set[str] = set()
    if tuner.bias == "all":
        # As in peft (``LoraModel._mark_only_adapters_as_trainable``).
        biases = {name for name in names if "bias" in name}
    elif tuner.bias == "lora_only":
        biases = {f"{name}.bias" for name in chosen.layers} & set(names)
    if tuner.bias != "none" and not biases:
        what = "the model has" if tuner.bias == "all" else "the adapted layers have"
        raise ConfigError(f"tuner.bias={tuner.bias}: {what} no bias; leave tuner.bias out")
    return own | biases


def is_pattern(targets: Any) -> bool:
    """Tell whether names of modules are given as a regular expression."""
    return isinstance(targets, str) and targets != "all-linear"


def _each(targets: Any) -> list[Any]:
    """Return each of the targets by itself, as :func:`is_named` takes it."""
    return [targets] if isinstance(targets, str) else [[target] for target in targets]


def _shown(target: Any) -> str:
    return target if isinstance(target, str) else str(target[0])


def is_named(layer: str, targets: Any) -> bool:
    """Tell whether a layer is named, as peft asks it.

    Args:
        targets: A list of names or endings of names, or a regular expression for whole names.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, layer) is not None
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


def _left_alone(model: Any, linear: dict[str, Any]) -> dict[str, str]:
    experts = count_experts(model.config)
    expert_names = _taken_for_experts(model)
    reasons = {}
    for name, layer in linear.items():
        owner, _, ending = name.rpartition(".")
        if _is_router(name, layer, experts):
            reasons[name] = _CHOOSES_EXPERTS
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


def _is_called_plainly(layer: Any) -> bool:
    """Tell whether a layer computes what a linear layer does, and returns it alone."""
    from torch import nn

    return type(layer).forward is nn.Linear.forward


def _is_state_space(module: Any) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return "A_log" in own and "D" in own


def _taken_for_experts(model: Any) -> set[str]:
    """Return the names of layers that peft maps to stacked experts: those before the stacking.

    peft maps every layer of that name, dense or shared ones too, in training and whenever such an
    adapter is loaded.
    """
    if not find_stacks(model):
        return set()
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return set()
    family = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {}).get(model.config.model_type)
    return set(getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {}).get(family, {}))
