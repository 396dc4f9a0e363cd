"""Training in plain PyTorch: documents alone, losses in fp64, torch's AdamW.

Imports nothing of llmtune.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

#: The name by which peft's parameters differ from those in its files.
ADAPTER = ".default."


def load_plainly(folder: Path, adapters: dict[str, torch.Tensor], rank: int, alpha: int) -> Any:
    """The model of a folder in fp32, with eager attention.

    Args:
        adapters: LoRA matrices to begin with, by their names in peft's model; empty for full
            fine-tuning.
        rank: Of the adapters.
        alpha: ``lora_alpha``.
    """
    # dtype=: some configurations of tiny models name another.
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    if not adapters:
        return model
    from peft import LoraConfig, get_peft_model

    prefix = "base_model.model."
    layers = sorted({name.removeprefix(prefix).partition(".lora_")[0] for name in adapters})
    # An expression, not a list: peft takes some names in lists for those of experts.
    names = "|".join(re.escape(layer) for layer in layers)
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=names)
    )
    parameters = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert set(parameters) == set(adapters)
    with torch.no_grad():
        for name, value in adapters.items():
            parameters[name].copy_(value)
    return model


def train_plainly(
    model: Any, steps: Sequence[Sequence[torch.Tensor]], rate: float, eps: float
) -> tuple[list[float], list[float]]:
    """Train on steps of documents, and compute the loss of the first step's documents once more
    behind the last.

    Args:
        steps: Token numbers of the documents of each step.
        rate: Learning rate, the same at every step.
        eps: AdamW's.

    Returns:
        Losses, one more than steps, and gradient norms before clipping, one a step.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, eps=eps, weight_decay=0.0)
    losses, norms = [], []
    for documents in steps:
        model.train()
        optimizer.zero_grad()
        loss = mean_loss(model, documents)
        loss.backward()
        norms.append(float(clip_grad_norm_(trained, 1.0)))
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    with torch.no_grad():
        losses.append(float(mean_loss(model, steps[0])))
    return losses, norms


def mean_loss(model: Any, documents: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over all tokens of all documents but the first of each, every document in a pass of its
    own.
    """
    total = torch.zeros((), dtype=torch.float64)
    for ids in documents:
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total = total - logits.double().log_softmax(-1).gather(1, ids[1:, None]).sum()
    return total / sum(len(ids) - 1 for ids in documents)
