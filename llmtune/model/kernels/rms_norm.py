"""Find the RMSNorm modules of a model, and compute them with torch's own function.

transformers writes RMSNorm in eight operations with copies in fp32 between them. On an NVIDIA GPU
``torch.nn.functional.rms_norm`` is one kernel, which rounds once, where torch has that kernel.
Modules are known by what they compute and not by their names: Gemma multiplies by ``1 + weight``,
others have gates.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from llmtune.draws import Draw, generator
from llmtune.model.kernels.replacement import Compute, Replacement, is_same, replace_forward

KIND = "RMSNorm"
#: The names that the constant has in transformers and elsewhere.
_EPS = ("variance_epsilon", "eps", "epsilon", "norm_eps")
#: The root mean square of tried rows. Those of the small ones show which constant is added.
_SCALES = (1.0, 30.0, 1e-2, 1e-3)

#: Devices for which torch may have a kernel, by the names of its dispatcher.
_DISPATCH_KEYS = {"cuda": "CUDA", "xpu": "XPU"}


def has_kernel(device: torch.device) -> bool:
    """Tell whether torch computes RMSNorm in one kernel on a device.

    Else its function is as many operations as the module is. Older versions have none at all, and
    no version has one for CPUs.
    """
    key = _DISPATCH_KEYS.get(device.type)
    if key is None or not hasattr(torch.ops.aten, "_fused_rms_norm"):
        return False
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_rms_norm", key))


def find_norms(model: nn.Module, dtype: torch.dtype, device: torch.device) -> list[Replacement]:
    """Find the modules that compute RMSNorm as torch does, and describe their replacements.

    No module is called and no weight is read, so that it can be done under ZeRO 3 by each rank
    alone: a copy of each kind of module with random weights is tried.

    Args:
        dtype: The training dtype.
        device: The device of the run.
    """
    found: list[Replacement] = []
    proved: dict[Any, Compute | None] = {}
    for name, module in model.named_modules():
        if not has_one_vector(module):
            continue
        key = _describe(module)
        if key not in proved:
            proved[key] = _find_fast(module, dtype, device)
        fast = proved[key]
        if fast is not None:
            found.append(replace_forward(module, name, KIND, fast, is_proved=True))
    return found


def is_right(module: nn.Module, fast: Compute, dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether a function computes what a module with one vector does, by values and gradients.

    Args:
        fast: Takes the module and its input.
    """
    width = _width(module)
    draw = generator(0, Draw.kernel_check)
    weight = torch.from_numpy(draw.normal(size=width) + 0.5).to(device, dtype)
    rows = draw.normal(size=(3, len(_SCALES), width)) * [[scale] for scale in _SCALES]
    hidden = torch.from_numpy(rows).to(device, dtype).requires_grad_()

    twin, parameter = copy.copy(module), nn.Parameter(weight)
    twin.__dict__["_parameters"] = {"weight": parameter}
    forward: Any = type(module).forward
    try:
        return is_same(partial(forward, twin), partial(fast, twin), [hidden], [parameter])
    except Exception:
        # A module that is something else may raise anything.
        return False


def has_one_vector(module: nn.Module) -> bool:
    """Tell whether a module has a vector named ``weight`` and nothing else, as norms do.

    torch's own class is left out, which calls the function already, and so is a module whose
    forward somebody has replaced.
    """
    own = dict(module.named_parameters(recurse=False))
    return (
        set(own) == {"weight"}
        and len(_shape(module)) == 1
        and "forward" not in module.__dict__
        and type(module) is not nn.RMSNorm
        and next(module.children(), None) is None
        and next(module.buffers(recurse=False), None) is None
    )


def _find_fast(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Compute | None:
    for name in _EPS:
        eps = getattr(module, name, None)
        if isinstance(eps, float):
            fast = _make_fast(_width(module), eps)
            if all(is_right(module, fast, one, device) for one in {torch.float32, dtype}):
                return fast
    return None


def _make_fast(width: int, eps: float) -> Compute:
    def normalize(module: Any, hidden: Any, *others: Any, **named: Any) -> Any:
        # What has another dtype, or a gate, is left to the module.
        if others or named or hidden.dtype is not module.weight.dtype:
            return type(module).forward(module, hidden, *others, **named)
        return functional.rms_norm(hidden, (width,), module.weight, eps)

    return normalize


def _shape(module: nn.Module) -> tuple[int, ...]:
    weight: Any = module.weight
    # Under ZeRO 3 the weight itself is empty.
    return tuple(getattr(weight, "ds_shape", weight.shape))


def _width(module: nn.Module) -> int:
    return _shape(module)[0]


def _describe(module: nn.Module) -> tuple[Any, ...]:
    """Describe what a module computes, so that those that are alike are tried once."""
    return type(module), _shape(module), tuple(sorted(_plain_values(module)))


def _plain_values(module: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in vars(module).items():
        if isinstance(value, int | float | str | None):
            yield name, repr(value)
