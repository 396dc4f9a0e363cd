"""QLoRA in plain PyTorch: transformers and bitsandbytes quantize the model, peft adapts it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmtune.config.compose import compose_config
from llmtune.config.groups.tuner import TunerConfig
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


def adapt_plainly(base: Path, settings: Any, tuner: TunerConfig, folder: Path) -> Any:
    """The model in 4 bits with adapters, which begin as the run's do.

    What PiSSA and OLoRA leave of a model is computed by peft on the model in fp32, stored, and
    quantized as any other model is.
    """
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    start, double_quant = tuner.init_lora_weights, tuner.bnb_4bit_use_double_quant
    if start in ("default", "loftq"):
        model = get_peft_model(load_plainly(base, double_quant), settings)
        if start == "loftq":
            begin_with_losses(model, base, settings)
        return model

    whole = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        replace(settings, init_lora_weights=start),
    )
    begun = {
        name: tensor
        for name, tensor in whole.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    rest = folder / "rest"
    whole.unload().save_pretrained(rest)
    model = get_peft_model(load_plainly(rest, double_quant), settings)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name in begun:
                tensor.copy_(begun[name])
    for layer in model.modules():
        if getattr(layer, "lora_magnitude_vector", None):
            # peft measures the lengths of a 4-bit base and its adapter together.
            layer.lora_magnitude_vector["default"].update_layer(
                base_layer=layer.get_base_layer(),
                lora_A=layer.lora_A["default"].weight,
                lora_B=layer.lora_B["default"].weight,
                scaling=layer.scaling["default"],
            )
    return model


def begin_with_losses(model: Any, base: Path, settings: Any) -> None:
    """Give each adapter the best approximation of what the quantization took from its layer.

    ``peft.replace_lora_weights_loftq`` does it on CUDA only, and for a scale of 1.
    """
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    originals = dict(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).named_modules()
    )
    scale = settings.lora_alpha / settings.r
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        stored = layer.get_base_layer().weight
        lost = originals[name].weight - dequantize_4bit(stored.data, stored.quant_state)
        left, values, right = torch.linalg.svd(lost.detach(), full_matrices=False)
        root = torch.sqrt(values[: settings.r] / scale)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(root[:, None] * right[: settings.r])
            layer.lora_B["default"].weight.copy_(left[:, : settings.r] * root)


def train_plainly(overrides: list[str], steps: int, cache: Path, folder: Path) -> list[float]:
    """The losses of the first steps, with the batches, adapters and rate of the same run.

    Which rows a step has, and what the adapters begin with, only the run can say; nothing else
    comes from llmtune.

    Args:
        folder: Where the tokenized rows go.
    """
    from peft import LoraConfig

    config = compose_config(overrides).config
    plan = resolve_plan(config, 1)
    base = resolve_model_folder(config.model, cache)
    tokenizer = load_tokenizer(base, config.model)
    data = prepare_data(config.data, tokenizer, config.seed, folder)
    batch = ScheduledBatch.from_config(config.train, plan.batch)
    collator = Collator(pad_token_id=int(tokenizer.pad_token_id))
    loader = TrainLoader(open_rows(data, "train"), batch, 0, config.seed, collator)

    tuner = config.tuner
    settings = LoraConfig(
        r=tuner.lora_r,
        lora_alpha=int(tuner.lora_alpha),
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        use_dora=tuner.use_dora,
        use_rslora=tuner.use_rslora,
    )
    torch.manual_seed(torch_seed(config.seed, Draw.adapter))
    model = adapt_plainly(base, settings, tuner, folder).train()
    faster = tuner.lora_plus_ratio or 1
    groups: list[dict[str, Any]] = [
        {"params": [tensor], "lr": plan.learning_rate * (faster if ".lora_B." in name else 1)}
        for name, tensor in model.named_parameters()
        if tensor.requires_grad
    ]
    trained = [group["params"][0] for group in groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.optim.weight_decay)
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
