"""Liger's kernels (the package ``liger-kernel``) for RMSNorm, SwiGLU and rotary positions.

The package has a function per architecture, ``apply_liger_kernel_to_llama`` and so on, which takes
the model and a flag per kernel. It binds forwards to modules of the model, and puts functions and
classes into transformers' file of the architecture. What it changed is found by looking before and
behind, so that each change can be compared with what was there, and taken back.

Its kernels of the loss stay off, because llmtune has its own.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from llmtune.model.kernels.replacement import Replacement, replace_forward
from llmtune.model.kernels.rms_norm import has_one_vector, is_right

#: Flags of Liger's functions that are set; all others are turned off.
WANTED = ("rope", "rms_norm", "swiglu")
#: What Liger binds to a module: its forward, and how it is printed.
_BOUND = ("forward", "extra_repr", "_get_name")


class NoLigerKernelsError(Exception):
    """Liger has nothing for the model, or what it has cannot be put in; the message says why."""


def find_liger(model: Any, dtype: torch.dtype, device: torch.device) -> list[Replacement]:
    """Let Liger change a model, take its changes back, and describe them as replacements.

    Args:
        model: A model of transformers, or peft's around one.
        dtype: The training dtype.
        device: The device of the run.

    Raises:
        NoLigerKernelsError: The architecture has no function, or the function failed. The model is
            as it was.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    kind = base.config.model_type
    apply = _find_function(kind)
    before = {module: _bound_to(module) for module in base.modules()}
    files = {file: dict(vars(file)) for file in _architecture_files()}
    try:
        apply(model=base, **_flags(apply))
        bound = {
            module: module.__dict__["forward"].__func__
            for module, old in before.items()
            if module.__dict__.get("forward") is not old.get("forward")
        }
        found = [*_replace_functions(files)]
    except Exception as error:
        # Versions of the two packages that do not fit may raise anything.
        raise NoLigerKernelsError(f"Liger's kernels do not fit {kind}: {_line(error)}") from error
    finally:
        _restore(before, files)

    for name, module in model.named_modules():
        if module not in bound:
            continue
        fast, title = bound[module], f"Liger's {type(module).__name__}"
        is_norm = has_one_vector(module)
        if not is_norm or is_right(module, fast, dtype, device):
            found.append(replace_forward(module, name, title, fast, is_proved=is_norm))
    return found


def _find_function(kind: str) -> Callable[..., Any]:
    try:
        package = importlib.import_module("liger_kernel.transformers.monkey_patch")
    except Exception as error:
        # It looks for a driver and a compiler when it is imported.
        raise NoLigerKernelsError(f"liger-kernel cannot be imported: {_line(error)}") from error
    apply: Callable[..., Any] | None = package.MODEL_TYPE_TO_APPLY_LIGER_FN.get(kind)
    if apply is None:
        raise NoLigerKernelsError(f"Liger has no kernels for {kind}")
    return apply


def _flags(apply: Callable[..., Any]) -> dict[str, bool]:
    """Return a value for each flag of one of Liger's functions."""
    parameters = inspect.signature(apply).parameters
    return {
        name: name in WANTED
        for name, parameter in parameters.items()
        if name in WANTED or isinstance(parameter.default, bool)
    }


def _bound_to(module: nn.Module) -> dict[str, Any]:
    return {name: module.__dict__[name] for name in _BOUND if name in module.__dict__}


def _architecture_files() -> list[ModuleType]:
    return [
        file
        for name, file in list(sys.modules.items())
        if name.startswith("transformers.models.") and ".modeling_" in name
    ]


def _replace_functions(files: dict[ModuleType, dict[str, Any]]) -> Iterator[Replacement]:
    """Describe the functions that were replaced in transformers' files.

    Classes are left out: the model is built, and its modules have the new forwards.
    """
    for file, before in files.items():
        for name, plain in before.items():
            fast = vars(file)[name]
            if fast is not plain and isinstance(plain, FunctionType):
                yield Replacement(
                    name=f"{file.__name__}.{name}",
                    kind=f"Liger's {name}",
                    plain=plain,
                    fast=fast,
                    put=partial(setattr, file, name),
                )


def _restore(
    modules: dict[nn.Module, dict[str, Any]], files: dict[ModuleType, dict[str, Any]]
) -> None:
    for module, bound in modules.items():
        for name in _BOUND:
            module.__dict__.pop(name, None)
        module.__dict__.update(bound)
    for file, before in files.items():
        for name, value in before.items():
            if vars(file)[name] is not value:
                setattr(file, name, value)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
