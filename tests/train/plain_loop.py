"""Training in plain PyTorch, transformers and peft: what the numbers of a run are compared with.

Nothing of it comes from llmtune. Documents are forwarded one at a time, so that there is no
padding, packing, accumulation, partition or reduction that could be wrong; the loss is taken in
fp64.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.optimization import Adafactor


@dataclass(frozen=True)
class Document:
    """A conversation as tokens."""

    ids: Tensor
    """Shape (tokens,)."""
    trained: Tensor
    """Which of ``ids`` the model is to learn. Shape (tokens,)."""


@dataclass(kw_only=True)
class Recipe:
    """What decides the arithmetic."""

    base: Path
    adapter: Path | None
    steps: list[list[Document]]
    """The documents of each optimizer step."""
    held_out: list[Document]
    learning_rate: float
    kind: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    optimizer: str = "adamw"
    trained: str = ""
    """Regular expression for the names of the weights that are trained; the others are frozen."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Peak rate and decay of weights whose names a pattern is found in; the first counts."""
    peaks: list[float] | None = None
    """What the learning rate of each step is multiplied by; None for nothing."""


@dataclass(kw_only=True)
class Curve:
    """What :func:`train` saw."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)
    """Before the first step and after the last one."""
    weights: dict[str, Tensor] = field(default_factory=dict)


def encode(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Document:
    """A conversation, of which the answers and the tokens that end them are learned."""
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            begin = len(
                str(
                    tokenizer.apply_chat_template(
                        messages[:number], tokenize=False, add_generation_prompt=True
                    )
                )
            )
            end = text.index(str(tokenizer.eos_token), begin) + len(str(tokenizer.eos_token))
            assert text[begin:end].startswith(message["content"])
            spans.append((begin, end))
    found: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    trained = torch.tensor(
        [any(begin <= at < end for begin, end in spans) for at, _ in found["offset_mapping"]]
    )
    # Nothing is learned of what the template writes behind the last answer, and nothing sees it.
    end = int(trained.nonzero()[-1]) + 1
    return Document(torch.tensor(found["input_ids"])[:end], trained[:end])


def train(recipe: Recipe) -> Curve:
    """The whole run."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        recipe.base, dtype=torch.float32, attn_implementation="eager"
    )
    if recipe.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, recipe.adapter, is_trainable=True)
    for name, weight in model.named_parameters():
        if not re.search(recipe.trained, name):
            weight.requires_grad_(False)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    groups = [of_weight(name, weight, recipe) for name, weight in trained.items()]
    optimizers = make_optimizers(recipe.optimizer, groups)
    curve = Curve(eval_losses=[evaluate(model, recipe.held_out)])
    for number, documents in enumerate(recipe.steps):
        rate = rate_of(number, recipe)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = rate * group["rate"] / recipe.learning_rate
        tokens = sum(int(document.trained[1:].sum()) for document in documents)
        loss = 0.0
        for document in documents:
            share = negative_log_likelihood(model, document) / tokens
            share.backward()
            loss += share.item()
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), recipe.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        curve.losses.append(loss)
        curve.norms.append(float(norm))
        curve.rates.append(rate)
    curve.eval_losses.append(evaluate(model, recipe.held_out))
    curve.weights = {name: weight.detach() for name, weight in trained.items()}
    return curve


def of_weight(name: str, weight: Tensor, recipe: Recipe) -> dict[str, Any]:
    """A group of one weight."""
    found = next((group for group in recipe.groups if re.search(group["pattern"], name)), {})
    decay = found.get("weight_decay", recipe.weight_decay)
    return {
        "params": [weight],
        "is_table": "embed" in name or "lm_head" in name,
        # Biases and norms are not decayed.
        "weight_decay": decay if weight.ndim > 1 else 0.0,
        "rate": found.get("learning_rate", recipe.learning_rate),
    }


def make_optimizers(kind: str, groups: list[dict[str, Any]]) -> list[Any]:
    """Torch's or transformers' own; with Muon two, of which each has its parameters."""
    adamw: dict[str, Any] = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}
    if kind == "lion":
        return [Lion(groups, {"lr": 0.0, "betas": (0.9, 0.99)})]
    if kind == "adafactor":
        # Torch's has no fixed learning rate.
        return [Adafactor(groups, lr=0.0, relative_step=False, scale_parameter=False)]
    if kind == "adamw":
        return [torch.optim.AdamW(groups, **adamw)]
    is_matrix = [g["params"][0].ndim == 2 and not g["is_table"] for g in groups]
    matrices = [group for group, is_one in zip(groups, is_matrix, strict=True) if is_one]
    others = [group for group, is_one in zip(groups, is_matrix, strict=True) if not is_one]
    made: list[Any] = [torch.optim.Muon(matrices, lr=0.0, adjust_lr_fn="match_rms_adamw")]
    return [*made, torch.optim.AdamW(others, **adamw)] if others else made


class Lion(torch.optim.Optimizer):
    """The program of the paper (https://arxiv.org/abs/2302.06675), one parameter at a time."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every weight by the rate, and decay it."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                direction = torch.sign(beta1 * momentum + (1 - beta1) * weight.grad)
                step = direction + group["weight_decay"] * weight
                weight -= group["lr"] * step
                momentum.copy_(beta2 * momentum + (1 - beta2) * weight.grad)


def rate_of(number: int, recipe: Recipe) -> float:
    """Linear warm-up that begins above 0, then constant, or down towards 0 one step after the
    last.
    """
    warm, total = recipe.warmup_steps, len(recipe.steps)
    peak = recipe.learning_rate * (recipe.peaks[number] if recipe.peaks is not None else 1.0)
    if number < warm:
        return peak * (number + 1) / (warm + 1)
    left = (total - number) / (total - warm)
    shape = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return peak * shape[recipe.kind]


def evaluate(model: Any, documents: list[Document]) -> float:
    """Mean loss of a learned token."""
    with torch.no_grad():
        total = sum(float(negative_log_likelihood(model, document)) for document in documents)
    return total / sum(int(document.trained[1:].sum()) for document in documents)


def negative_log_likelihood(model: Any, document: Document) -> Tensor:
    """Summed over the learned tokens, in fp64."""
    logits = model(input_ids=document.ids[None]).logits[0, :-1].double()
    likelihoods = torch.log_softmax(logits, dim=-1).gather(1, document.ids[1:, None])[:, 0]
    return -likelihoods[document.trained[1:]].sum()


def load_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    """As transformers reads it."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    return tokenizer
