"""Find the experts' matrices that are stacked in one parameter, and choose those with adapters.

A stack is no linear layer. peft adapts it where ``target_parameters`` names it, with one pair of
matrices for each expert, which are stacked as well (``ParamWrapper`` of
``peft/tuners/lora/layer.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtune.errors import ConfigError
from llmtune.tuner.blocks import find_blocks
from llmtune.tuner.head import in_modules
from llmtune.tuner.whole_parameters import whole_shape

if TYPE_CHECKING:
    from llmtune.config.groups.tuner import TunerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A parameter with an adapter: the matrices of all experts of a layer."""

    experts: int
    inputs: int
    """Columns of ``A``, of which each expert has ``r`` rows."""
    outputs: int
    """Rows of ``B``, of which each expert has ``r`` columns."""
    numel: int
    is_transposed: bool
    """Each matrix is stored as (in, out)."""
    owner: str
    """Path of the module that has the parameter."""
    adapter: str
    """peft's path of the adapter in the model.

    peft puts a layer around the module for each of its stacks, in the order of the parameters, so
    that the last one is the outermost.
    """


def count_experts(architecture: Any) -> int:
    """Read the number of a layer's experts from a configuration; 0 for a dense model."""
    text = architecture.get_text_config()
    for section in (text, getattr(text, "ffn_config", None)):
        for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
            if experts := getattr(section, key, None):
                return int(experts)
    return 0


def find_stacks(model: Any) -> dict[str, Any]:
    """Find the parameters that are stacks of experts' matrices, by name.

    Args:
        model: A transformers model, on any device, under ZeRO 3 with slices of its parameters.
    """
    experts = count_experts(model.config)
    found = {}
    for owner, module in model.named_modules():
        # A convolution has three dimensions too.
        if type(module).__module__.startswith("torch."):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            shape = whole_shape(parameter)
            full = f"{owner}.{name}"
            if len(shape) == 3 and (shape[0] == experts or ".experts." in full):
                found[full] = parameter
    return found


def choose_stacks(model: Any, tuner: TunerConfig, whole: Sequence[str] = ()) -> dict[str, Stack]:
    """Choose the stacks that ``tuner.target_parameters`` names, in the order of the model.

    Args:
        model: A transformers model, on any device.
        whole: Paths of the modules that are trained themselves.

    Raises:
        ConfigError: A name matches no stack, or one in a module that is trained itself.
    """
    if not tuner.target_parameters:
        return {}
    stacks = find_stacks(model)
    for target in tuner.target_parameters:
        if not any(is_target(name, [target]) for name in stacks):
            raise ConfigError(_unmatched(model, target, stacks))
    names = [name for name in stacks if is_target(name, tuner.target_parameters)]
    if saved := [name for name in names if in_modules(name, whole)]:
        raise ConfigError(
            f"tuner.target_parameters={tuner.target_parameters}: {saved[0]} is in a module that"
            " tuner.modules_to_save trains whole; take it out of one of them"
        )
    if tuner.layers_to_transform and (blocks := find_blocks(model)) is not None:
        # A number that the model does not have is refused with the layers.
        paths = [blocks.path(index) for index in tuner.layers_to_transform]
        names = [name for name in names if in_modules(name, paths)]
    return describe_stacks(model, names)


def describe_stacks(model: Any, names: Sequence[str]) -> dict[str, Stack]:
    """Describe stacks by their names, of which all that have adapters are given."""
    return {name: _describe(model, name, names) for name in names}


def is_target(parameter: str, targets: Iterable[str]) -> bool:
    """Tell whether a parameter is named in full or by its end behind a dot, as peft asks it."""
    return any(f".{parameter}".endswith(f".{target}") for target in targets)


def name_in_layers(model: Any, names: Iterable[str]) -> list[str]:
    """Return names as ``tuner.target_parameters`` takes them: within a layer, once for all."""
    blocks = find_blocks(model)
    prefix = f"{blocks.name}." if blocks is not None else ""
    short: dict[str, None] = {}
    for name in names:
        inside = name.removeprefix(prefix)
        short[inside.partition(".")[2] if inside != name else name] = None
    return list(short)


def _describe(model: Any, name: str, chosen: Sequence[str]) -> Stack:
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    shape = whole_shape(getattr(module, own))
    experts, first, second = shape
    # As in peft, which asks the module for the order of its sides.
    is_transposed = bool(getattr(module, "is_transposed", False))
    inputs, outputs = (first, second) if is_transposed else (second, first)
    beside = [other for other in chosen if other.rpartition(".")[0] == owner]
    depth = len(beside) - 1 - beside.index(name)
    return Stack(
        experts=experts,
        inputs=inputs,
        outputs=outputs,
        numel=experts * first * second,
        is_transposed=is_transposed,
        owner=owner,
        adapter=owner + depth * ".base_layer",
    )


def _unmatched(model: Any, target: str, stacks: Iterable[str]) -> str:
    """Say why a name of ``tuner.target_parameters`` matches no stack, and what there is."""
    known = name_in_layers(model, stacks)
    has = f"the model has [{','.join(known)}]" if known else "the model has none"
    others = [name for name, _ in model.named_parameters() if is_target(name, [target])]
    if not others:
        return f"tuner.target_parameters: {target} names no stack of experts' matrices; {has}"
    shape = " x ".join(map(str, whole_shape(model.get_parameter(others[0]))))
    return (
        f"tuner.target_parameters: {others[0]} ({shape}) is no stack of experts' matrices; layers"
        f" are named with tuner.target_modules, and of stacks {has}"
    )
