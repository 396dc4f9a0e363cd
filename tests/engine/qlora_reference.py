"""QLoRA in plain PyTorch: transformers and bitsandbytes quantize the model, peft adapts it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from llmtune.config.compose import compose_config
from llmtune.config.schema import Config
from llmtune.data.load.collate import Collator
from llmtune.data.load.loader import StepBatch, TrainLoader
from llmtune.data.prepared_data import open_rows
from llmtune.draws import Draw, torch_seed
from llmtune.model.build import sees_padding
from llmtune.model.task_folder import resolve_task_folder
from llmtune.model.token_folder import resolve_base_folder
from llmtune.model.tokenizer import load_tokenizer
from llmtune.plan.length.batch_schedule import ScheduledBatch
from llmtune.plan.resolve import resolve_plan
from llmtune.run.task import adopt_task, prepare_rows, resolve_labels
from llmtune.storage.tensors.dtypes import configured_dtype
from llmtune.task.task import find_task


class PlainQlora:
    """A model with adapters, and the steps that the same run on one rank trains it with.

    Which rows a step has, what adapters and a head begin with, and the rate, only the run can say;
    nothing else comes from llmtune.
    """

    def __init__(self, overrides: list[str], steps: int, cache: Path, **settings: Any):
        """Args:
        settings: Of peft's ``LoraConfig``, beside the rank, the scale and the task.
        """
        self.config = config = adopt_task(compose_config(overrides)).config
        task = find_task(config.model.task)
        self.model_class = task.model_class
        self.rate = resolve_plan(config, 1).learning_rate
        self.weight_decay, self.max_norm = config.optim.weight_decay, config.train.max_grad_norm
        base = resolve_base_folder(config.model, config.tuner.new_tokens, cache, print)
        tokenizer = load_tokenizer(base, config.model)
        data = prepare_rows(config, tokenizer, cache)
        labels = resolve_labels(config, data, base)
        self.folder = resolve_task_folder(
            base, config.model, labels, tokenizer, config.seed, cache, print
        )
        model = load_plainly(self.folder, self.model_class, config)
        self.model = begin_plainly(adapt_plainly(model, task.peft_type, config, settings), self)
        collator = Collator(
            pad_token_id=int(tokenizer.pad_token_id),
            masked=sees_padding(model),
            token_types="token_type_ids" in tokenizer.model_input_names and task.needs_labels,
            find_targets=partial(task.make_targets, labels=labels),
            find_weights=partial(task.row_weights, of=labels),
        )
        batch = ScheduledBatch.from_config(config.train, resolve_plan(config, 1).batch)
        loader = TrainLoader(open_rows(data, "train"), batch, 0, config.seed, collator)
        starts = itertools.islice(loader.step_starts(), steps)
        self.steps = [loader.step_at(*start) for start in starts]

    def train(self) -> list[float]:
        """Train, with master weights in fp32 as in mixed precision; the loss before each step."""
        named = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        trained = list(named.values())
        masters = [one.detach().float().requires_grad_() for one in trained]
        ratio = self.config.tuner.lora_plus_ratio or 1.0
        rates = [self.rate * (ratio if ".lora_B." in name else 1.0) for name in named]
        groups = [
            {"params": [master], "lr": rate} for master, rate in zip(masters, rates, strict=True)
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        losses = []
        for step in self.steps:
            loss = self.loss_of(step)
            for master, gradient in zip(masters, torch.autograd.grad(loss, trained), strict=True):
                master.grad = gradient.float()
            torch.nn.utils.clip_grad_norm_(masters, self.max_norm)
            optimizer.step()
            with torch.no_grad():
                for parameter, master in zip(trained, masters, strict=True):
                    parameter.copy_(master)
            losses.append(float(loss))
        return losses

    def loss_of(self, step: StepBatch) -> torch.Tensor:
        """The mean cross entropy of a step's targets: tokens, or the classes of rows."""
        total = torch.zeros((), dtype=torch.float64)
        for rows in step.micro_batches:
            logits = self.model(**rows.inputs).logits
            judged = logits.reshape(-1, logits.shape[-1])[rows.targets.positions].double()
            likelihoods = torch.log_softmax(judged, dim=-1)
            total = total - likelihoods.gather(1, rows.targets.values[:, None]).sum()
        return total / step.loss_weight


def load_plainly(folder: Path, model_class: str, config: Config) -> Any:
    """The model in 4 bits as transformers loads it, computing in the run's dtype."""
    dtype = configured_dtype(config.precision.value)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.tuner.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=dtype,
        # By itself transformers quantizes a head that has a bias, which peft cannot train then.
        llm_int8_skip_modules=None if model_class.endswith("LM") else ["classifier", "score"],
    )
    return getattr(transformers, model_class).from_pretrained(
        folder, dtype=dtype, quantization_config=settings, attn_implementation="eager"
    )


def adapt_plainly(model: Any, task: str, config: Config, settings: dict[str, Any]) -> Any:
    """peft's adapters, and its copy of a head, in the run's dtype."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(torch_seed(config.seed, Draw.adapter))
    lora = LoraConfig(
        **{
            "r": config.tuner.lora_r,
            "lora_alpha": int(config.tuner.lora_alpha),
            "target_modules": "all-linear",
            "task_type": task,
            "use_dora": config.tuner.use_dora,
            "use_rslora": config.tuner.use_rslora,
            **settings,
        }
    )
    adapted = get_peft_model(model, lora).train()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(configured_dtype(config.precision.value))
    return adapted


def begin_plainly(adapted: Any, plain: PlainQlora) -> Any:
    """Begin adapters as the run does: with a part of the base, or with what NF4 takes from it."""
    start = plain.config.tuner.init_lora_weights
    if start == "default":
        return adapted
    if start == "loftq":
        begin_with_losses(adapted, plain)
        return adapted
    return leave_rest(adapted, plain)


def begin_with_losses(adapted: Any, plain: PlainQlora) -> None:
    """Give each adapter the best approximation of what the quantization took from its layer.

    ``peft.replace_lora_weights_loftq`` does it on CUDA only, and for a scale of 1.
    """
    from bitsandbytes.functional import dequantize_4bit

    originals = dict(load_whole(plain).named_modules())
    for name, layer in adapted.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        stored, rank = layer.get_base_layer().weight, layer.r["default"]
        lost = originals[name].weight - dequantize_4bit(stored.data, stored.quant_state)
        left, values, right = torch.linalg.svd(lost.detach(), full_matrices=False)
        root = torch.sqrt(values[:rank] / layer.scaling["default"])
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(root[:, None] * right[:rank])
            layer.lora_B["default"].weight.copy_(left[:, :rank] * root)


def leave_rest(adapted: Any, plain: PlainQlora) -> Any:
    """Quantize what PiSSA or OLoRA leave of the model, which peft computes in fp32.

    Returns:
        The adapted model of the rest.
    """
    from peft import get_peft_model

    settings = adapted.peft_config["default"]
    asked = replace(settings, init_lora_weights=plain.config.tuner.init_lora_weights)
    whole = get_peft_model(load_whole(plain), asked)
    begun = {
        name: tensor
        for name, tensor in whole.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    with TemporaryDirectory() as folder:
        whole.unload().save_pretrained(folder)
        rest = load_plainly(Path(folder), plain.model_class, plain.config)
    model = get_peft_model(rest, settings).train()
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


def load_whole(plain: PlainQlora) -> Any:
    """The model of the run in fp32."""
    return getattr(transformers, plain.model_class).from_pretrained(
        plain.folder, dtype=torch.float32
    )


def train_plainly(overrides: list[str], steps: int, cache: Path, **settings: Any) -> list[float]:
    """The losses of the first steps."""
    return PlainQlora(overrides, steps, cache, **settings).train()
