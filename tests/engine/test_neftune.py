"""Noise on embeddings: transformers' formula, in training alone, and resumed to the last digit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.integrations.neftune import activate_neftune

from llmtune.engine.neftune import add_noise
from tests.support import run_cli

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 30,
}
ARCHITECTURES: list[Any] = [
    transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8),
    transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30),
    transformers.BertConfig(**SIZES),
    transformers.DebertaV2Config(**SIZES),
]


def build(config: Any, lora: tuple[str, ...] | None) -> Any:
    torch.manual_seed(0)
    model: Any = transformers.AutoModel.from_config(config)
    if lora is None:
        return model
    return get_peft_model(model, LoraConfig(r=2, target_modules=list(lora)))


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.model_type)
@pytest.mark.parametrize("is_adapted", [False, True])
def test_it_is_that_of_transformers(config: Any, is_adapted: bool) -> None:
    names = {"gpt2": ("c_attn",), "bert": ("query",), "deberta-v2": ("query_proj",)}
    lora = names.get(config.model_type, ("q_proj",)) if is_adapted else None
    own, reference, plain = (build(config, lora) for _ in range(3))
    add_noise(own, 5.0)
    activate_neftune(reference, 5.0)
    inputs = {"input_ids": torch.arange(14).view(2, 7)}
    found = []
    for model in (own, reference, plain):
        model.train()
        torch.manual_seed(3)
        found.append(model(**inputs).last_hidden_state)
        model.eval()
        found.append(model(**inputs).last_hidden_state)
    assert torch.allclose(found[0], found[2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[4], rtol=1e-2, atol=1e-2)
    assert torch.equal(found[1], found[5]), "an evaluation has none"


def test_ranks_that_are_seeded_apart_draw_apart() -> None:
    model = build(ARCHITECTURES[0], None)
    add_noise(model, 5.0)
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        drawn.append(model.train().get_input_embeddings()(torch.zeros(1, 4, dtype=torch.long)))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    limit = 5.0 / (4 * 16) ** 0.5
    largest = (drawn[0] - model.get_input_embeddings().weight[0]).abs().max()
    assert limit / 2 < float(largest) <= limit * 1.001


@pytest.mark.process
@pytest.mark.slow
def test_a_run_with_noise_and_smoothing_resumes_to_the_last_digit(tmp_path: Path) -> None:
    job = [
        *("model=tiny", "data.train=stdlib_docs@60", "data.max_seq_length=256", "tuner=lora"),
        *("data.overlong=truncate", "train.sample_answers=false", "zero=3", "launch.nproc=2"),
        *("precision=fp32", "export=none", "schedule=constant", "schedule.warmup_ratio=0"),
        *("data.val_set_size=4", "optim.learning_rate=1e-2"),
    ]
    extra = ["train.neftune_noise_alpha=5", "train.label_smoothing=0.1"]
    records = {}
    for name, more in (
        ("plain", ["train.max_steps=1"]),
        ("whole", [*extra, "train.max_steps=3"]),
        ("begun", [*extra, "train.max_steps=2"]),
        ("begun", [*extra, "train.max_steps=3"]),
    ):
        done = run_cli(*job, *more, f"output_dir={tmp_path / name}")
        assert done.code == 0, done.err
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        records[name] = [json.loads(line) for line in lines]
    losses = {
        name: [record["loss"] for record in of_run if "loss" in record]
        for name, of_run in records.items()
    }
    assert losses["begun"] == losses["whole"]
    # The held-out loss is that without noise and without smoothing.
    first = {
        name: next(record["eval_loss"] for record in of_run if "eval_loss" in record)
        for name, of_run in records.items()
    }
    assert first["whole"] == first["plain"]
    assert abs(losses["whole"][0] - losses["plain"][0]) > 1e-3
