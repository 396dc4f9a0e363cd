"""One rank that writes checkpoints with DeepSpeed itself, or llmtune's with the live master weights
beside them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from llmtune.engine.distributed import Rank, barrier
from tests.engine import worker
from tests.joined import join_ranks

#: Odd sizes, so that parameters lie across the ends of partitions and every kind of padding is
#: there.
VOCAB, HIDDEN, INNER, ROWS = 67, 24, 37, 5


class WithBuffers(torch.nn.Module):
    """A Llama below a module that has buffers, a single number, and, where DeepSpeed can do it, a
    parameter without elements.
    """

    def __init__(self, llama: Any, empty: bool) -> None:
        super().__init__()
        self.llama = llama
        self.register_buffer("table", torch.randn(7, 3))
        self.register_buffer("counts", torch.arange(5))
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        self.gain = torch.nn.Parameter(torch.tensor([1.5]))
        if empty:
            self.nothing = torch.nn.Parameter(torch.empty(0, 4))

    def forward(self, tokens: torch.Tensor) -> Any:
        """The loss."""
        return self.llama(input_ids=tokens, labels=tokens).loss * self.gain.squeeze()


def make_model(task: dict[str, Any]) -> Any:
    """A tiny Llama with tied embeddings; ``lora`` puts adapters on it, ``frozen`` names what is not
    trained.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            attention_bias=True,
        )
    )
    if task.get("lora") is not None:
        settings = {
            "r": 3,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
            **task["lora"],
        }
        model: Any = get_peft_model(llama, LoraConfig(**settings), autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    else:
        model = WithBuffers(llama, empty=task["stage"] < 3)
    for name, parameter in model.named_parameters():
        if any(part in name for part in task.get("frozen", ())):
            parameter.requires_grad_(False)
    return model


def write_zero(task: dict[str, Any], rank: Rank) -> None:
    """Train two steps and let DeepSpeed save."""
    import deepspeed

    model = make_model(task)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    precision = task.get("precision", "bf16")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": task["stage"], **task.get("zero", {})},
        **({} if precision == "fp32" else {precision: {"enabled": True}}),
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=[group for group in groups if group["params"]], config=config
    )
    for step in range(2):
        torch.manual_seed(rank.rank + 10 * step)
        tokens = torch.randint(VOCAB, (1, ROWS))
        output = (
            engine(tokens)
            if isinstance(model, WithBuffers)
            else engine(input_ids=tokens, labels=tokens).loss
        )
        engine.backward(output)
        engine.step()
    engine.save_checkpoint(
        task["folder"], tag="global_step2", exclude_frozen_parameters=task.get("exclude", False)
    )
    if rank.is_first and task.get("lora") is not None:
        # Where transformers' Trainer puts it.
        model.peft_config["default"].save_pretrained(task["folder"])
    engine.destroy()


def write_own(task: dict[str, Any], rank: Rank) -> None:
    """A checkpoint of llmtune, and the master weights that DeepSpeed's own functions find at the
    same step.
    """
    save = worker.save

    def save_and_tell(module: Any, *rest: Any) -> Any:
        masters = live_masters(module)
        if rank.is_first:
            torch.save(masters, task["masters"])
        return save(module, *rest)

    with patch.object(worker, "save", save_and_tell):
        worker.run_task(task, rank)


def live_masters(module: Any) -> dict[str, torch.Tensor]:
    """Every parameter in fp32. Collective under ZeRO."""
    from deepspeed.utils import safe_get_full_fp32_param

    if module.zero_stage:
        return {
            name: safe_get_full_fp32_param(p).cpu().clone()
            for name, p in module.model.named_parameters()
        }
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    optimizer = module.engine.optimizer
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {
        names[id(p)]: m.detach().clone()
        for low, high in pairs
        for p, m in zip(low, high, strict=True)
    }


if __name__ == "__main__":
    this = join_ranks()
    worker.ask_cpu_once()
    for todo in json.loads(sys.argv[1]):
        (write_own if "masters" in todo else write_zero)(todo, this)
    if this.is_first:
        Path(sys.argv[2]).write_text("[]")
    barrier(this)
    os._exit(0)
