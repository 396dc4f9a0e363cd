"""Test whether documents that share a row influence each other in a model.

This is tried, not looked up, so that no architecture can be forgotten. Two documents are packed as
the collator packs them, and the same two in the other order. The model computes each of them twice:
behind the other one, and at the beginning of a row, where a causal model sees nothing else. A
difference comes from the other document, or from positions that do not restart.

It is tried twice. Before any rank starts, a small model with random weights of the same
architecture (:mod:`llmtune.plan.architecture.shrink`) is tried in fp32 on the CPU. That is exact
enough to see the smallest leak (a short convolution over the border moves logits by a thousandth),
and takes a tenth of a second, for a model of 70 B parameters too. Before step 1 the model that is
trained is tried as it is trained: with its adapters, attention kernel, device, precision and ZeRO
stage. That is one more forward pass. In 16 bits it sees only leaks above rounding, and it is the
only trial where the small model cannot be made, or where the kernel is a GPU's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmtune.data.load.batch import Batch
from llmtune.data.load.collate import Collator
from llmtune.data.store.token_store import Row
from llmtune.draws import Draw, generator, torch_seed
from llmtune.engine.distributed import all_reduce_sum, gather_rows
from llmtune.errors import ConfigError
from llmtune.model.attention import answer_on_host
from llmtune.plan.abilities import named_positions
from llmtune.plan.architecture.shrink import VOCABULARY, shrink
from llmtune.varlen_attention import VARLEN, exchanging

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmtune.engine.train_module import TrainModule

#: Tokens of the two documents of the small model. The first is longer than any window of the small
#: model, and ends beyond the positions (256) up to which bf16, in which some models hold them,
#: counts every one.
SMALL_LENGTHS = (300, 40)
#: Tokens of the two documents of the trained model.
LENGTHS = (40, 24)

#: Largest difference of a logit of the small model, in units of their spread, that is rounding.
#: Measured over 60 architectures: rounding is below 6e-6, leaks are above 8e-5.
SMALL_LIMIT = 2e-5
#: Largest root mean square of all differences of the trained model, in the same unit.
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}

_ADVICE = (
    "data.packing=true would train every document on the end of the one before it. Take"
    " data.packing=false (data=text and other groups set it to true): rows then hold one document"
    " each"
)
#: Whether rows are packed -> what brought documents into one row, and what to take instead.
_ASKED = {
    True: ("data.packing=true", _ADVICE),
    False: (
        f"model.attn_implementation={VARLEN}",
        "Take model.attn_implementation=sdpa: rows are padded then",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """The influence of the documents of a row on each other."""

    largest: float
    """Largest difference of a logit, in units of the logits' spread."""
    mean_square: float
    """Root mean square of all differences, in the same unit; NaN if a logit is NaN."""
    nan_alone: tuple[int, ...] = ()
    """Documents (0 and 1) with NaN logits at the beginning of a row."""
    nan_behind: tuple[int, ...] = ()
    """Documents with NaN logits behind the other one."""


def measure_mixing(
    forward: Callable[[Batch], torch.Tensor], collator: Collator, documents: tuple[Row, Row]
) -> Mixing:
    """Compare documents behind another one with the same documents at the beginning of a row.

    Args:
        forward: Computes the logits of a batch. Shape (rows, length, vocabulary), or (1, rows *
            length, vocabulary) for a flattened batch.
        collator: Packs as in training.
    """
    # Both orders in one batch: each document comes first once, and once behind the other.
    one, other = documents
    batch = collator.pack([_join(one, other), _join(other, one)])
    logits = forward(batch).float()
    rows = logits.reshape(2, len(one.ids) + len(other.ids), -1)
    first, second = len(one.ids), len(other.ids)
    alone = (rows[0, :first], rows[1, :second])
    behind = (rows[1, second:], rows[0, first:])
    nan_alone, nan_behind = _find_nan(alone), _find_nan(behind)
    if nan_alone or nan_behind:
        return Mixing(
            largest=math.nan, mean_square=math.nan, nan_alone=nan_alone, nan_behind=nan_behind
        )

    difference = _difference(torch.cat(alone), torch.cat(behind))
    return Mixing(
        largest=float(difference.abs().max()),
        mean_square=float(difference.square().mean().sqrt()),
    )


def _difference(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return the differences of logits, in units of the spread of the expected ones."""
    # Some models give tokens that cannot follow a logit of minus infinity.
    finite = expected[expected.isfinite()]
    spread = float(finite.sub(finite.mean()).square().mean().sqrt()) if len(finite) else 0.0
    return torch.where(found == expected, 0.0, found - expected) / (spread or 1.0)


def _find_nan(documents: tuple[torch.Tensor, torch.Tensor]) -> tuple[int, ...]:
    return tuple(index for index in (0, 1) if bool(documents[index].isnan().any()))


def _join(one: Row, other: Row) -> Row:
    return _as_row(np.concatenate([one.ids, other.ids]), (len(one.ids), len(other.ids)))


def _as_row(ids: NDArray[np.int32], documents: tuple[int, ...]) -> Row:
    return Row(ids=ids, mask=np.ones(len(ids), bool), documents=documents)


def draw_documents(lengths: tuple[int, int], vocabulary: int) -> tuple[Row, Row]:
    """Draw two documents of random tokens, the same on every rank."""
    draw = generator(0, Draw.packing_probe)
    one, other = (_as_row(draw.integers(0, vocabulary, n, dtype=np.int32), (n,)) for n in lengths)
    return one, other


def find_leak(architecture: Any, kernel: str, trust_remote_code: bool) -> Mixing | None:
    """Try a small model of an architecture; None if it cannot be made.

    Args:
        architecture: A transformers configuration.
        kernel: The attention kernel; a GPU's is replaced by the eager one, which all models have.
    """
    from transformers import AutoModelForCausalLM

    collator = Collator(pad_token_id=0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(torch_seed(0, Draw.packing_probe))
        try:
            # A small model with random weights, the same in every run.
            small = shrink(architecture)
            settings = {
                "attn_implementation": kernel if kernel == "sdpa" else "eager",
                "trust_remote_code": trust_remote_code,
            }
            model = AutoModelForCausalLM.from_config(small, dtype=torch.float32, **settings).eval()
            answer_on_host(model)

            # Two documents that fit into its positions.
            positions = named_positions(small) or sum(SMALL_LENGTHS)
            lengths = (
                max(2, min(SMALL_LENGTHS[0], positions - SMALL_LENGTHS[1])),
                SMALL_LENGTHS[1],
            )
            documents = draw_documents(lengths, min(VOCABULARY, int(small.vocab_size)))
            return measure_mixing(
                lambda batch: model(**batch.inputs, use_cache=False).logits, collator, documents
            )
        except Exception:
            # A narrow model of unknown code may raise anything; the real model is tried before step
            # 1.
            return None


def try_architecture(
    architecture: Any, kernel: str, name: str, trust_remote_code: bool
) -> str | None:
    """Try a small model of an architecture, and say what is wrong; None if nothing is.

    Args:
        architecture: A transformers configuration.
        kernel: The attention kernel.
        name: The model's name in messages.
    """
    mixing = find_leak(architecture, kernel, trust_remote_code)
    if mixing is None or mixing.nan_alone:
        # Random weights may give NaN in an architecture whose trained weights do not.
        return None
    if mixing.nan_behind:
        return _describe_nan(mixing, name)
    return _describe_leak(mixing.largest, SMALL_LIMIT, name, architecture.model_type)


def _describe_leak(
    size: float, limit: float, name: str, kind: str, packed: bool = True
) -> str | None:
    """Describe differences above the limit.

    Args:
        size: The size of the differences, in units of the logits' spread.
        limit: The largest size that is rounding.
        kind: The architecture's ``model_type``.
    """
    # A size that is NaN is above the limit, too.
    if size <= limit:
        return None
    asked, advice = _ASKED[packed]
    return (
        f"{asked}: {name} does not keep the documents of a row apart: behind another"
        f" document the logits of one change by {size:.1e} of their spread. In transformers'"
        f" {kind}, earlier documents of a row influence later ones, or positions do not restart."
        f" {advice}"
    )


def _describe_nan(mixing: Mixing, name: str, packed: bool = True) -> str:
    def named(documents: tuple[int, ...]) -> str:
        return " and ".join(("the first", "the second")[index] for index in documents)

    asked, advice = _ASKED[packed]
    where = "of two documents of random tokens that were packed into a row, logits of"
    if mixing.nan_alone:
        return (
            f"model.name_or_path={name}: the model answers with NaN: {where}"
            f" {named(mixing.nan_alone)} are NaN at the beginning of the row. That"
            " is not packing: weights are NaN or infinite, or overflow in this precision (of"
            " precision=fp16, take bf16 or fp32). Fetch the model again, or look where its"
            " training went wrong"
        )
    return (
        f"{asked}: {name} answers with NaN behind another document: {where}"
        f" {named(mixing.nan_behind)} are NaN behind the other one, and are not where it"
        f" comes first. {advice}"
    )


def check_module(
    module: TrainModule,
    collator: Collator,
    vocabulary: int,
    dtype: torch.dtype,
    name: str,
    packed: bool = True,
) -> None:
    """Try the model that is about to be trained.

    Collective: all ranks compute the same documents and decide alike.

    Args:
        vocabulary: The model's vocabulary size.
        dtype: The training dtype.
        name: The model's name in messages.
        packed: Whether rows are packed; else they are one behind the other in a batch.

    Raises:
        ConfigError: On every rank: documents of a row see each other, or the model answers with
            NaN.
    """
    documents, limit = draw_documents(LENGTHS, vocabulary), LIMITS[dtype]
    with exchanging(None):
        mixing = measure_mixing(module.logits, collator, documents)

    # Sums over ranks, so that all of them raise the same error.
    flags = [float(index in mixing.nan_alone) for index in (0, 1)]
    flags += [float(index in mixing.nan_behind) for index in (0, 1)]
    size, *counts = all_reduce_sum([mixing.mean_square, *flags], module.rank)
    if any(counts):
        alone = tuple(index for index in (0, 1) if counts[index])
        behind = tuple(index for index in (0, 1) if counts[2 + index])
        raise ConfigError(
            _describe_nan(
                Mixing(
                    largest=math.nan,
                    mean_square=math.nan,
                    nan_alone=alone,
                    nan_behind=behind,
                ),
                name,
                packed,
            )
        )
    problem = _describe_leak(
        size / module.rank.world_size, limit, name, module.model.config.model_type, packed
    )
    if problem is not None:
        raise ConfigError(problem)
    if collator.part.count > 1:
        _check_parts(module, collator, documents, limit, name)


def _check_parts(
    module: TrainModule, collator: Collator, documents: tuple[Row, Row], limit: float, name: str
) -> None:
    """Compare tokens that the ranks of a group share with the same tokens on one rank.

    Collective.

    Args:
        limit: Largest root mean square of the differences, in units of the logits' spread.
        name: The model's name in messages.

    Raises:
        ConfigError: On every rank: something else than attention looks at other tokens.
    """
    whole = collator.pack([_join(*documents)])
    with exchanging(None):
        alone = module.logits(whole)[0].float()
    own = module.logits(collator.part.cut(whole, collator.pad_token_id))[0].float()
    # The parts of the first group, which has the same tokens as the others.
    together = gather_rows(own, module.rank)[: len(alone)]
    difference = float(_difference(alone, together).square().mean().sqrt())
    (size,) = all_reduce_sum([difference], module.rank)
    if not size / module.rank.world_size <= limit:
        raise ConfigError(
            f"launch.sequence_parallel_size={collator.part.count}: {name} answers otherwise where"
            f" ranks share the tokens of a row: logits change by"
            f" {size / module.rank.world_size:.1e} of their spread. Leave"
            " launch.sequence_parallel_size out"
        )
