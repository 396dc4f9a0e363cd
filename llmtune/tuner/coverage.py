"""The share of a model's weights that adapters reach, by kind of module."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

#: Kinds of modules, and what is searched for in the name of a weight; the first that is found
#: counts. They are the words of transformers' architectures.
_KINDS = (
    ("experts", r"\.experts\."),
    ("routers", r"router|(^|\.)(shared_expert_)?gate\.|block_sparse_moe\.gate"),
    ("embeddings", r"embed|(^|\.)(wte|wpe)\."),
    ("attention", r"attn|attention|(^|\.)(q|k|v|o|qkv|out)_proj\."),
    ("state space", r"mixer|mamba|ssm"),
    ("MLP", r"mlp|ffn|feed_forward|(^|\.)(fc\d?|w\d|up_proj|gate_proj|down_proj)\.|shared_expert"),
    ("MLP", r"\.(intermediate|output)\.dense"),
    ("head", r"(^|\.)(lm_head|score|classifier|pooler|embed_out)\b"),
)


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix of a model."""

    name: str
    numel: int
    reached: int
    """Elements that are trained: all of one with an adapter, or single rows of a table."""


def describe_coverage(weights: Iterable[Weight]) -> str:
    """Describe the share of the weights that is reached, of all and of each kind of module."""
    totals: dict[str, list[int]] = {}
    for weight in weights:
        counted = totals.setdefault(_kind(weight.name), [0, 0])
        counted[0] += weight.reached
        counted[1] += weight.numel
    reached = sum(counted[0] for counted in totals.values())
    every = sum(counted[1] for counted in totals.values())
    shares = ", ".join(f"{kind} {_share(*counted)}" for kind, counted in totals.items())
    return f"adapters reach {_share(reached, every)} of the weights: {shares}"


def _kind(name: str) -> str:
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), "others")


def _share(part: int, whole: int) -> str:
    """Write a share that is rounded to 0 or 100 % only where it is so."""
    if part in (0, whole):
        return "100 %" if part else "0 %"
    return f"{min(max(100 * part / whole, 0.1), 99.9):.3g} %"
