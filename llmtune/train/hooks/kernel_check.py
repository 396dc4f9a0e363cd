"""Put faster kernels into a model before step 1, after they were compared with the plain modules.

Each replacement is tried twice. On random numbers every kind of module is compared in values and
gradients, in the run's precision and on its device, where that can be done without its weights.
Then one batch of random tokens goes through the model as it is trained: with its weights, adapters
and ZeRO stage. Every replaced module computes it both ways, and the next one goes on with the plain
result, so that differences do not add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmtune.config.groups.model import Kernels, ModelConfig
from llmtune.draws import Draw, generator
from llmtune.engine.distributed import Rank, all_reduce_any, gather_objects
from llmtune.model.kernels.liger import NoLigerKernelsError, find_liger
from llmtune.model.kernels.lora_sum import find_sums
from llmtune.model.kernels.replacement import Replacement, rounding_limit
from llmtune.model.kernels.rms_norm import find_norms, has_kernel
from llmtune.plan.abilities import resolve_kernels
from llmtune.varlen_attention import exchanging

if TYPE_CHECKING:
    from llmtune.engine.train_module import TrainModule

#: Rows of the tried batch, and tokens of each.
ROWS, TOKENS = 2, 16


@dataclass(frozen=True, slots=True)
class _RandomTokens:
    """A batch that has no targets."""

    input_ids: torch.Tensor
    masked: bool

    @property
    def inputs(self) -> Mapping[str, Any]:
        given = {"input_ids": self.input_ids}
        if self.masked:
            given["attention_mask"] = torch.ones_like(self.input_ids)
        return given

    def to(self, device: torch.device | str) -> _RandomTokens:
        return _RandomTokens(self.input_ids.to(device), self.masked)


def use_kernels(
    module: TrainModule,
    model: ModelConfig,
    vocabulary: int,
    dtype: torch.dtype,
    masked: bool,
    say: Callable[[str], None],
) -> list[Replacement]:
    """Put the kernels of ``model.kernels`` into the model that is about to be trained.

    Collective: all ranks replace the same modules, since under ZeRO 3 each module gathers its
    weights.

    Args:
        model: The keys of ``model``.
        vocabulary: The model's vocabulary size.
        dtype: The training dtype.
        masked: The model must be told where padding is.
        say: Writes a line to the console.

    Returns:
        The replacements in use.
    """
    rank, in_fp32 = module.rank, dtype is torch.float32
    kernels = resolve_kernels(model.kernels, rank.device.type, in_fp32)
    if kernels is Kernels.none:
        return []
    found: list[Replacement] = []
    # Nodes may differ in what is installed.
    if not any(all_reduce_any([kernels is not Kernels.liger], rank)):
        found = _find_liger(module.model, dtype, rank.device, say)
    with_norms = model.kernels is Kernels.torch or has_kernel(rank.device)
    taken = {one.name for one in found}
    for one in _find_torch(module.model, dtype, rank.device, with_norms):
        if one.name not in taken:
            found.append(one)
    found = _keep_common(found, rank)
    if not found:
        return []
    limit = rounding_limit(dtype)
    _try_batch(module, found, vocabulary, masked)
    wrong = all_reduce_any([_is_wrong(one, limit) for one in found], rank)
    used = [one for one, is_wrong in zip(found, wrong, strict=True) if not is_wrong]
    dropped = [one for one, is_wrong in zip(found, wrong, strict=True) if is_wrong]
    for one in used:
        one.use()
    if used:
        say(f"kernels: {_count(used)} replaced; they compute the same within rounding")
    for kind in dict.fromkeys(one.kind for one in dropped):
        of_kind = [one for one in dropped if one.kind == kind]
        say(_describe_dropped(of_kind, limit))
    return used


def _find_liger(
    model: Any, dtype: torch.dtype, device: torch.device, say: Callable[[str], None]
) -> list[Replacement]:
    try:
        return find_liger(model, dtype, device)
    except NoLigerKernelsError as error:
        say(f"kernels: {error}; torch's functions are taken instead")
        return []


def _find_torch(
    model: Any, dtype: torch.dtype, device: torch.device, with_norms: bool
) -> list[Replacement]:
    """Find what torch's functions replace; norms where it has a kernel, or where they are asked."""
    norms = find_norms(model, dtype, device) if with_norms else []
    return [*norms, *find_sums(model, dtype, device)]


def _keep_common(found: list[Replacement], rank: Rank) -> list[Replacement]:
    """Keep what all ranks found, in the same order on each."""
    by_key = {f"{one.kind} {one.name}": one for one in found}
    common = set(by_key).intersection(*gather_objects([*by_key], rank))
    return [by_key[key] for key in sorted(common)]


def _try_batch(
    module: TrainModule, found: Sequence[Replacement], vocabulary: int, masked: bool
) -> None:
    """Compute one batch both ways, and leave the model as it was."""
    ids = generator(0, Draw.kernel_check).integers(0, vocabulary, (ROWS, TOKENS))
    batch: Any = _RandomTokens(torch.from_numpy(ids), masked)
    try:
        for one in found:
            one.compare()
        # Layers are compiled later, without the comparison in them.
        # Each rank has whole rows here, also where ranks share the tokens of rows in training.
        with torch.compiler.set_stance("force_eager"), exchanging(None):
            module.logits(batch)
    finally:
        for one in found:
            one.drop()


def _is_wrong(one: Replacement, limit: float) -> bool:
    """Tell whether a replacement is not to be used; what no token reached must be proved."""
    if one.seen.difference is None:
        return not one.is_proved
    return one.seen.exceeds(limit)


def _describe_dropped(dropped: Sequence[Replacement], limit: float) -> str:
    first = dropped[0]
    what = f"model.kernels: {_count(dropped)} not used (first: {first.name}): "
    if first.seen.error is not None:
        return f"{what}{first.seen.error}"
    if first.seen.difference is None or not first.seen.exceeds(limit):
        return f"{what}not tried on this rank, or different on another one"
    return (
        f"{what}a row of a batch of random tokens differs by {first.seen.difference:.1e} from the"
        f" plain module, and up to {limit:.1e} is rounding"
    )


def _count(replacements: Sequence[Replacement]) -> str:
    counts = Counter(one.kind for one in replacements)
    return ", ".join(f"{kind} x {number}" for kind, number in counts.items())
