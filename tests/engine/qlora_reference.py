"""QLoRA in plain PyTorch: transformers and bitsandbytes quantize the model, peft adapts it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from llmtune.config.compose import compose_config
from llmtune.data.load.collate import Collator
from llmtune.data.load.loader import TrainLoader
from llmtune.data.prepare import prepare_data
from llmtune.data.prepared_data import open_rows
from llmtune.draws import Draw, torch_seed
from llmtune.model.source import resolve_model_folder
from llmtune.model.tokenizer import load_tokenizer
from llmtune.plan.length.batch_schedule import ScheduledBatch
from llmtune.plan.resolve import resolve_plan


def load_plainly(folder: Path, double_quant: bool) -> Any:
    """The model in 4 bits as transformers loads it, computing in fp32."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=settings, attn_implementation="eager"
    )


def train_plainly(overrides: list[str], steps: int, cache: Path, folder: Path) -> list[float]:
    """The losses of the first steps, with the batches, adapters and rate of the same run.

    Which rows a step has, and what the adapters begin with, only the run can say; nothing else
    comes from llmtune.

    Args:
        folder: Where the tokenized rows go.
    """
    from peft import LoraConfig, get_peft_model

    config = compose_config(overrides).config
    plan = resolve_plan(config, 1)
    base = resolve_model_folder(config.model, cache)
    tokenizer = load_tokenizer(base, config.model)
    data = prepare_data(config.data, tokenizer, config.seed, folder)
    batch = ScheduledBatch.from_config(config.train, plan.batch)
    collator = Collator(pad_token_id=int(tokenizer.pad_token_id))
    loader = TrainLoader(open_rows(data, "train"), batch, 0, config.seed, collator)

    model = load_plainly(base, config.tuner.bnb_4bit_use_double_quant)
    torch.manual_seed(torch_seed(config.seed, Draw.adapter))
    settings = LoraConfig(
        r=config.tuner.lora_r,
        lora_alpha=int(config.tuner.lora_alpha),
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, settings).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=plan.learning_rate, weight_decay=config.optim.weight_decay
    )
    losses = []
    for start in itertools.islice(loader.step_starts(), steps):
        step, total = loader.step_at(*start), 0.0
        for rows in step.micro_batches:
            logits = model(**rows.inputs).logits
            judged = logits.reshape(-1, logits.shape[-1])[rows.targets.positions].double()
            likelihoods = torch.log_softmax(judged, dim=-1)
            picked = likelihoods.gather(1, rows.targets.values[:, None])
            loss = -picked.sum() / step.loss_weight
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses
