"""Small bases of several architectures, and adapters on them as peft writes them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

TOKENS = torch.tensor([[3, 17, 250, 4, 90, 31, 7, 200, 5, 11]])


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model in fp32, where merging is exact."""
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).save_pretrained(folder)
    copy_tokenizer(tiny_model, folder)
    return folder


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Any tokenizer will do for a random model."""
    for file in [*source.glob("tokenizer*"), *source.glob("*.jinja")]:
        shutil.copyfile(file, folder / file.name)


def make_base(
    kind: str, folder: Path, tokenizer: Path, dtype: torch.dtype = torch.float32, rows: int = 512
) -> Path:
    """A random base: ``llama``, ``llama-tied``, ``llama-twice``, ``llama-bias`` or ``gpt2``.

    ``llama-twice`` is tied and its file holds the one matrix under both names; ``gpt2`` is tied and
    stores outputs as columns.
    """
    torch.manual_seed(0)
    model: Any
    if kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=rows,
                n_embd=48,
                n_layer=2,
                n_head=2,
                n_positions=64,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=rows,
                hidden_size=48,
                intermediate_size=112,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=kind in ("llama-tied", "llama-twice"),
                attention_bias=kind == "llama-bias",
            )
        )
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.to(dtype).save_pretrained(folder)
    if kind == "llama-twice":
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    copy_tokenizer(tokenizer, folder)
    return folder


def make_adapter(
    base: Path, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any
) -> Path:
    """An adapter whose every trainable number was moved, as a training would."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    rows = settings.pop("resize_to", None)
    if rows:
        torch.manual_seed(5)
        model.resize_token_embeddings(rows)
    given = {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
        **settings,
    }
    wrapped = get_peft_model(model, LoraConfig(**given))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    wrapped.save_pretrained(str(folder))
    return folder
