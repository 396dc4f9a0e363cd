"""Choose the linear layers whose weights QLoRA keeps in 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmtune.tuner.head import in_modules


def find_quantized_layers(model: Any, head: Sequence[str] = ()) -> dict[str, Any]:
    """Find the layers that transformers quantizes when it loads a model in 4 bits.

    These are its linear layers but the output projection, tied weights, the last module, and those
    that the architecture keeps in fp32. transformers' own functions choose them. Experts that are
    stacked in one tensor are no linear layers, and stay in 16 bits.

    Args:
        model: A transformers model, on any device.
        head: Names of the modules that are the task's head, which is trained itself.

    Returns:
        Path -> ``nn.Linear``, or GPT-2's ``Conv1D``, whose weight is quantized transposed.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and should_convert_module(name, kept)
        and not in_modules(name, head)
    }
