"""Every kind of LoRA against peft and plain PyTorch: losses, resumes, and what is stored."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM

from llmtune.config.compose import compose_config
from llmtune.data.load.collate import Collator
from llmtune.data.load.loader import StepBatch, TrainLoader
from llmtune.data.prepare import prepare_data
from llmtune.data.prepared_data import open_rows
from llmtune.draws import Draw, torch_seed
from llmtune.model.token_folder import resolve_base_folder
from llmtune.model.tokenizer import load_tokenizer
from llmtune.plan.length.batch_schedule import ScheduledBatch
from llmtune.plan.resolve import resolve_plan
from llmtune.task.losses import sum_cross_entropy
from tests.support import first, largest_difference, train_engines

BASE = [
    *("model=tiny", "data.train=stdlib_docs@200", "data.max_seq_length=256"),
    *("data.overlong=truncate", "optim.learning_rate=2e-3", "optim.weight_decay=0"),
    *("precision=fp32", "tuner.lora_r=4", "tuner.lora_alpha=8"),
]
RATE, SEED, HALF, STEPS = 2e-3, 42, 5, 10
#: Of which rows are trained: two frequent ones, and one that does not occur.
TOKENS = [11, 40, 3]

#: Stacked experts, whose matrices are (out, in) in the one and (in, out) in the other.
MIXTURE = ("hidden_size=32", "intermediate_size=48", "head_dim=8", "num_experts_per_tok=2")
NUMBERS = {
    "experts": ("model_type=qwen3_moe", "num_experts=4", "moe_intermediate_size=16", *MIXTURE),
    "transposed experts": ("model_type=gpt_oss", "num_local_experts=4", *MIXTURE),
}
MODELS = {
    kind: [f"model.config.{number}" for number in numbers] for kind, numbers in NUMBERS.items()
}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TARGETS = f"tuner.target_parameters=[{','.join(STACKS)}]"

#: Overrides of a kind, and what peft calls it.
KINDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "lora": (["tuner=lora"], {}),
    "dora": (["tuner=dora"], {"use_dora": True}),
    "rslora": (["tuner=rslora"], {"use_rslora": True}),
    "lora_plus": (["tuner=lora_plus"], {}),
    "pissa": (["tuner=pissa", "tuner.init_lora_weights=pissa"], {"init_lora_weights": "pissa"}),
    "olora with dora and rslora": (
        ["tuner=dora", "tuner.use_rslora=true", "tuner.init_lora_weights=olora"],
        {"use_dora": True, "use_rslora": True, "init_lora_weights": "olora"},
    ),
    "token rows, tied": (
        ["tuner=lora", f"tuner.trainable_token_indices={TOKENS}"],
        {"trainable_token_indices": TOKENS},
    ),
    "token rows of both": (
        [
            *("tuner=dora", "model.config.tie_word_embeddings=false"),
            f"tuner.trainable_token_indices={{embed_tokens: {TOKENS}, lm_head: [7]}}",
        ],
        {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [7]}, "use_dora": True},
    ),
    # Words of the rows, which become the first tokens behind the tokenizer's 512.
    "new tokens": (
        ["tuner=lora", "tuner.new_tokens=[return,string]"],
        {"trainable_token_indices": [512, 513]},
    ),
    "experts": (
        [*MODELS["experts"], "tuner=lora", TARGETS],
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "target_parameters": STACKS},
    ),
    "transposed experts": (
        [
            *MODELS["transposed experts"],
            *("tuner=lora_plus", "tuner.target_modules=[]", TARGETS),
            "train.gradient_checkpointing=true",
        ],
        {"target_modules": [], "target_parameters": STACKS},
    ),
}
#: Those whose matrices B have a learning rate of their own.
WITH_RATIO = ("lora_plus", "transposed experts")
PLACES = [(stage, ranks) for stage in (0, 2, 3) for ranks in (1, 2)]
#: One place for each of some kinds in the ordinary suite: together they are all places.
CHOSEN = [
    ("lora", (0, 1)),
    ("dora", (3, 2)),
    ("pissa", (3, 1)),
    ("token rows, tied", (0, 2)),
    ("new tokens", (2, 1)),
    ("experts", (2, 2)),
    ("transposed experts", (3, 1)),
]
CELLS = [(kind, place) for kind in KINDS for place in PLACES]


@functools.cache
def batches(kind: str) -> tuple[Path, list[StepBatch]]:
    """The model's folder, and the batches of the steps on one rank."""
    config = compose_config([*BASE, *KINDS[kind][0]]).config
    cache = Path(config.paths.cache_dir)
    plan = resolve_plan(config, 1)
    folder = resolve_base_folder(config.model, config.tuner.new_tokens, cache, print)
    tokenizer = load_tokenizer(folder, config.model)
    data = prepare_data(config.data, tokenizer, config.seed, cache)
    scheduled = ScheduledBatch.from_config(config.train, plan.batch)
    collator = Collator(pad_token_id=int(tokenizer.pad_token_id))
    loader = TrainLoader(open_rows(data, "train"), scheduled, 0, config.seed, collator)
    assert config.seed == SEED
    starts = itertools.islice(loader.step_starts(), STEPS)
    return folder, [loader.step_at(*start) for start in starts]


def base_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def summed_loss(model: Any, batch: StepBatch) -> torch.Tensor:
    sums = [
        sum_cross_entropy(model(**one.inputs, use_cache=False).logits, one.targets)
        for one in batch.micro_batches
    ]
    return torch.stack(sums).sum() / batch.loss_weight


@functools.cache
def train_plainly(kind: str) -> list[float]:
    """Train with peft on one process: the loss before each step."""
    folder, steps = batches(kind)
    torch.manual_seed(torch_seed(SEED, Draw.adapter))
    settings = LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "task_type": "CAUSAL_LM",
            **KINDS[kind][1],
        }
    )
    model: Any = get_peft_model(base_model(folder), settings)
    ratio = 16 if kind in WITH_RATIO else 1
    # Groups of peft's own, where there is more than one rate.
    optimizer: Any = torch.optim.AdamW(
        [one for one in model.parameters() if one.requires_grad], lr=RATE, weight_decay=0.0
    )
    if ratio != 1:
        optimizer = create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=ratio
        )
    losses = []
    for batch in steps:
        loss = summed_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.process
@pytest.mark.parametrize("ranks", first(1, [2, 1]))
@pytest.mark.parametrize(
    "cells",
    [
        pytest.param(CHOSEN, id="one place each"),
        pytest.param(CELLS, id="all places", marks=pytest.mark.slow),
    ],
)
def test_every_kind_is_pefts_in_every_place(
    cells: list[tuple[str, tuple[int, int]]],
    ranks: int,
    tmp_path: Path,
) -> None:
    here = [cell for cell in cells if cell[1][1] == ranks]
    tasks: list[dict[str, Any]] = [
        {"overrides": [*BASE, *KINDS[kind][0], f"zero={stage}"], "first": 0, "last": STEPS}
        for kind, (stage, _) in here
    ]
    folders = [tmp_path / f"{ranks}-{at}" / f"checkpoint-{HALF}" for at in range(len(here))]
    pairs = list(zip(tasks, map(str, folders), strict=True))
    saving = [{**task, "save": place, "save_at": HALF} for task, place in pairs]
    loading = [{**task, "first": HALF, "load": place} for task, place in pairs]
    found = train_engines([*saving, *loading], ranks, tmp_path, timeout=900)
    for at, (kind, place) in enumerate(here):
        folder, steps = batches(kind)
        losses, resumed = found[at]["losses"], found[len(here) + at]["losses"]
        assert largest_difference(losses, train_plainly(kind)) < 1e-5, (kind, place)
        assert resumed == losses[HALF:], (kind, place)
        assert found[at]["unreached"] == [], (kind, place)
        # What is stored is an adapter of the unchanged base.
        folder, steps = batches(kind)
        stored = PeftModel.from_pretrained(base_model(folder), str(folders[at]))
        with torch.no_grad():
            assert abs(float(summed_loss(stored, steps[HALF])) - losses[HALF]) < 1e-5, kind
            merged = stored.merge_and_unload()
            assert abs(float(summed_loss(merged, steps[HALF])) - losses[HALF]) < 1e-4, kind
    names = {kind for kind, _ in here}
    curves = {tuple(train_plainly(kind)) for kind in names}
    assert len(curves) == len(names), "every kind trains in its own way"
