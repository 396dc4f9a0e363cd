"""Merges that went wrong in one way each, written as the tensors that would lie on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from llmtune.storage.tensors.tensor_spec import TensorSpec

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a merge starts from and what it should come to, in fp64."""

    base: Tensors
    right: Tensors
    stored: Tensors
    """The right merge, in the merged dtype."""
    dtype: torch.dtype
    settings: dict[str, Any]
    """Of ``adapter_config.json``."""
    adapter: Tensors

    def change(self, name: str) -> torch.Tensor:
        """What the adapter adds to one tensor."""
        return self.right[name] - self.base[name]

    def changed(self, part: str = "") -> list[str]:
        """Tensors that the adapter changes."""
        return [
            name
            for name in self.base
            if part in name and not torch.equal(self.right[name], self.base[name])
        ]

    def put(self, new: Tensors) -> Tensors:
        """The right merge with some tensors put in their place, rounded once."""
        return self.stored | {name: tensor.to(self.dtype) for name, tensor in new.items()}


class Held:
    """Tensors in memory as a source."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self.specs = {
            name: TensorSpec(name, tensor.dtype, tuple(tensor.shape))
            for name, tensor in tensors.items()
        }

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """In pieces of an uneven number of rows."""
        yield from self.tensors[name].split(37)


def _scaled(part: str, factor: Callable[[Case, str], float]) -> Callable[[Case], Tensors]:
    """The change of some modules, multiplied."""

    def plant(case: Case) -> Tensors:
        return case.put(
            {
                name: case.base[name] + factor(case, name) * case.change(name)
                for name in case.changed(part)
            }
        )

    return plant


def _one(
    part: str, make: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Callable[[Case], Tensors]:
    """One tensor, made of the base's and the change."""

    def plant(case: Case) -> Tensors:
        name = case.changed(part)[0]
        return case.put({name: make(case.base[name], case.change(name))})

    return plant


def _half_rows(base: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    found = base + change
    found[len(base) // 2 :] = base[len(base) // 2 :]
    return found


def _one_row(base: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    found = base + change
    found[3] = base[3]
    return found


def _without_last_rank(base: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    left, sizes, right = torch.linalg.svd(change, full_matrices=False)
    rank = int((sizes > sizes[0] * 1e-9).sum())
    found: torch.Tensor = base + (left[:, : rank - 1] * sizes[: rank - 1]) @ right[: rank - 1]
    return found


def _of_other_layer(case: Case) -> Tensors:
    first, second = "model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"
    return case.put(
        {
            first: case.base[first] + case.change(second),
            second: case.base[second] + case.change(first),
        }
    )


def _other_base(case: Case) -> Tensors:
    torch.manual_seed(9)
    noise = {
        name: torch.randn_like(tensor) * tensor.std()
        for name, tensor in case.base.items()
        if tensor.ndim == 2
    }
    return case.put({name: case.right[name] + tensor for name, tensor in noise.items()})


def _one_number_of_the_base(case: Case) -> Tensors:
    name = next(name for name in case.stored if "embed_tokens" in name or "wpe" in name)
    tensor = case.stored[name].clone()
    bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
    bits[5, 7] += 1
    return case.stored | {name: tensor}


def _rounded_twice(case: Case) -> Tensors:
    between = torch.float16 if case.dtype is torch.bfloat16 else torch.bfloat16
    return case.put({name: case.right[name].to(between) for name in case.changed("weight")})


def _cut_off(case: Case) -> Tensors:
    """The nearest number towards zero."""
    found = {}
    for name in case.changed("weight"):
        rounded = case.right[name].to(case.dtype)
        further = rounded.double().abs() > case.right[name].abs()
        bits = rounded.view({2: torch.int16, 4: torch.int32}[rounded.element_size()])
        found[name] = torch.where(further, (bits - 1).view(case.dtype), rounded)
    return case.stored | found


def _change_rounded_first(case: Case) -> Tensors:
    kind = torch.bfloat16 if case.dtype is torch.float32 else case.dtype
    return case.put(
        {
            name: case.base[name] + case.change(name).to(kind).double()
            for name in case.changed("proj.weight")
        }
    )


def _without(part: str) -> Callable[[Case], Tensors]:
    """A tensor is not there at all."""

    def plant(case: Case) -> Tensors:
        name = next(name for name in case.stored if part in name)
        return {key: tensor for key, tensor in case.stored.items() if key != name}

    return plant


def _unasked(case: Case) -> Tensors:
    return case.stored | {
        "model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 48, dtype=case.dtype)
    }


def _plain_sum(case: Case) -> Tensors:
    """DoRA merged as LoRA: its lengths are lost."""
    return case.put({name: _lora_sum(case, name) for name in case.changed("proj.weight")})


def _lengths_of_the_base(case: Case) -> Tensors:
    """DoRA with the norms of the base, not of the sum."""
    found = {}
    for name in case.changed("proj.weight"):
        lengths = case.adapter[_key(name, "lora_magnitude_vector")].double()
        norms = case.base[name].norm(dim=1)
        found[name] = _lora_sum(case, name) * (lengths / norms).view(-1, 1)
    return case.put(found)


def _lora_sum(case: Case, name: str) -> torch.Tensor:
    a, b = (case.adapter[_key(name, f"lora_{side}.weight")].double() for side in "AB")
    change: torch.Tensor = b @ a * (case.settings["lora_alpha"] / case.settings["r"] ** 0.5)
    return case.base[name] + change


def _key(name: str, part: str) -> str:
    return f"base_model.model.{name.removesuffix('.weight')}.{part}"


def _token_rows_shifted(case: Case) -> Tensors:
    name = "model.embed_tokens.weight"
    found = case.base[name].clone()
    for row in case.settings["trainable_token_indices"]:
        found[row - 1] = case.right[name][row]
    return case.put({name: found})


def _head_of_the_embedding(case: Case) -> Tensors:
    """The head got the embedding's change with it, as where both stay one matrix."""
    return case.put({"lm_head.weight": case.right["model.embed_tokens.weight"]})


def _scale(wrong: Callable[[dict[str, Any], int], float]) -> Callable[[Case, str], float]:
    """The factor between a wrong scale and the right one of plain LoRA, by a module's rank."""

    def factor(case: Case, name: str) -> float:
        key = _key(name, "lora_A.weight")
        rank = case.adapter[key].shape[0] if key in case.adapter else case.settings["r"]
        pattern = 32 if "layers.1.mlp.up_proj" in name else case.settings["lora_alpha"]
        return wrong(case.settings, rank) / (pattern / rank)

    return factor


#: Scene -> name of the fault -> the tensors that it leaves.
FAULTS: dict[str, dict[str, Callable[[Case], Tensors]]] = {
    "LoRA": {
        "the scale is lost": _scaled("proj.weight", _scale(lambda settings, rank: 1.0)),
        "the scale is applied twice": _scaled("proj.weight", lambda case, name: 3.0),
        "another alpha": _scaled("proj.weight", lambda case, name: 13 / 12),
        "alpha's pattern is passed over": _scaled(
            "layers.1.mlp.up_proj", lambda case, name: 12 / 32
        ),
        "rank's pattern is passed over": _scaled("q_proj.weight", lambda case, name: 8 / 4),
        "rsLoRA's scale": _scaled(
            "proj.weight", lambda case, name: 2.0 if "q_proj" not in name else 8**0.5
        ),
        "one module is left out": _one("gate_proj.weight", lambda base, change: base.clone()),
        "half of one module's change": _one(
            "gate_proj.weight", lambda base, change: base + change / 2
        ),
        "nine tenths of one module's change": _one(
            "v_proj.weight", lambda base, change: base + change * 0.9
        ),
        "half of one module's rows": _one("up_proj.weight", _half_rows),
        "one row of one module": _one("up_proj.weight", _one_row),
        "the last rank of one module": _one("k_proj.weight", _without_last_rank),
        "one module's change is transposed": _one(
            "o_proj.weight", lambda base, change: base + change.T
        ),
        "one module's change has the other sign": _one(
            "down_proj.weight", lambda base, change: base - change
        ),
        "one module is merged twice": _one(
            "down_proj.weight", lambda base, change: base + 2 * change
        ),
        "two layers are swapped": _of_other_layer,
        "another base": _other_base,
        "one number of the base": _one_number_of_the_base,
        "rounded twice": _rounded_twice,
        "cut off, not rounded": _cut_off,
        "the change is rounded before it is added": _change_rounded_first,
        "a bias is missing": _without("q_proj.bias"),
        "a bias is not copied": _one("k_proj.bias", lambda base, change: base.clone()),
        "a matrix is missing": _without("layers.1.mlp.down_proj.weight"),
        "a matrix of the adapter is left in": _unasked,
    },
    "DoRA": {
        "the lengths are lost": _plain_sum,
        "the norms are the base's": _lengths_of_the_base,
        "half of one module's change, DoRA": _one(
            "v_proj.weight", lambda base, change: base + change / 2
        ),
    },
    "saved": {
        "a saved module is not copied": _one("lm_head.weight", lambda base, change: base.clone()),
        "a saved vector is not copied": _one(
            "model.norm.weight", lambda base, change: base.clone()
        ),
        "trained rows are not copied": _one(
            "embed_tokens.weight", lambda base, change: base.clone()
        ),
        "trained rows lie one row off": _token_rows_shifted,
    },
    "tied": {
        "the embedding's change is left out": _one(
            "embed_tokens.weight", lambda base, change: base.clone()
        ),
        "half of the embedding's rows": _one("embed_tokens.weight", _half_rows),
        "the head that was untied is missing": _without("lm_head.weight"),
        "the head moves with the embedding": _head_of_the_embedding,
    },
    "Conv1D": {
        "fan_in_fan_out is passed over": _one(
            "attn.c_proj.weight", lambda base, change: base + change.T
        ),
        "half of the stored rows": _one("c_attn.weight", _half_rows),
        "the bias of B has no scale": _one("c_fc.bias", lambda base, change: base + change / 3),
        "the bias of B is left out": _one("c_fc.bias", lambda base, change: base.clone()),
    },
}
