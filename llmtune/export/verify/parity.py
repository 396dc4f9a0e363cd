"""Whether what was merged is base and adapter: every stored number, and the logits of both models.

Numbers are recomputed from peft's own layers (:mod:`llmtune.export.verify.recompute`); that tells a
lost part of the smallest change from rounding, which answers cannot do. The logits then tell what
numbers cannot: that the folder's configuration makes the same function of them. Both models are
streamed, so that neither has to fit; base and adapter run in peft, which knows nothing of our
merge. All arithmetic is fp32, so that what is left is the rounding of the stored weights. A number
rounded to ``p`` bits is off by at most ``u = 2**-p`` of itself, at random, so a matrix product by
about ``u / sqrt(3)``; the bound of the logits is a few times that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llmtune.errors import ExportError
from llmtune.export.merge.peft_adapter import Adapter
from llmtune.export.sources.tensor_source import TensorSource, some
from llmtune.export.verify.expected_tensors import find_expected
from llmtune.export.verify.module_outputs import (
    OutputComparison,
    PerturbedSource,
    perturb_parameters,
    relative_error,
)
from llmtune.export.verify.recompute import Agreement, Recomputation
from llmtune.export.verify.streamed_model import StreamedModel
from llmtune.model.skeleton import build_skeleton, tied_aliases

#: Relative error of one rounding.
ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-24}

#: Two orders of summing the same fp32 products.
_ARITHMETIC = 1e-5

#: The logits of a deep model gather the errors of all modules.
_LOGIT_ROUNDINGS = 48

#: Of what a random rounding does to the logits, where a model answers otherwise at the least.
_MOST_SHAKES = 4.0

#: Share of the change below rounding from which on it is worth a word of its own.
_MUCH_LOST = 0.5

_ROWS, _POSITIONS = 4, 24
_TEXTS = (
    (
        "The committee met on Tuesday to discuss the proposal. After three hours of debate, most"
        " members agreed that the plan needed further work before it could be adopted, and the"
        " chair asked for a new draft by the end of the month."
    ),
    (
        "def merge(left, right):\n    result = []\n    while left and right:\n       "
        " result.append((left if left[0] <= right[0] else right).pop(0))\n    return result + left"
        " + right\n\nprint(merge([1, 4, 9], [2, 3, 10]))"
    ),
    (
        "Question: A train leaves at 14:35 and takes 2 hours and 50 minutes. When does it"
        " arrive?\nAnswer: It arrives at 17:25, because 14:35 plus 2:50 is 17:25. Question: How"
        " many minutes is that in all? Answer: 170 minutes, or 10,200 seconds."
    ),
    (
        "Les élèves ont visité le musée hier. Морской воздух был холодным и солёным."
        " 今日は天気がいいですね。 El perro duerme bajo la mesa, y nadie quiere despertarlo; mañana"
        " será otro día. Wo ist der Bahnhof, bitte? Straße, Fuß, Öl."
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """What was compared, and how near it came."""

    logits: float | None
    """Largest relative difference of a position's logits, their mean taken off; None where numbers
    alone were compared.
    """
    bound: float
    agreement: Agreement
    """Of the stored numbers with recomputed ones."""
    dtype: torch.dtype
    """What the numbers are rounded to."""
    answers: dict[str, float]
    """Modules whose numbers could not be recomputed -> relative difference of what they answer."""
    adapted: bool
    """Whether an adapter was merged; without one, what was compared is the rounding alone."""
    quantized: str | None = None
    """As what the numbers are stored after they were compared, where that is coarser than
    ``dtype``.
    """

    def describe(self) -> str:
        """One line for the console and the card: which check each module got, and how much of the
        change is stored.
        """
        return self._describe() + (
            f". That is of the numbers before they are stored as {self.quantized}, which is not"
            " compared"
            if self.quantized
            else ""
        )

    def _describe(self) -> str:
        of = "base and adapter" if self.adapted else "the weights before they were rounded"
        text = "logits not compared"
        if self.logits is not None:
            text = f"logits within {self.logits:.1e} of {of} (bound {self.bound:.1e})"
        kind = str(self.dtype).removeprefix("torch.")
        if not self.adapted:
            return (
                f"{text}; {self.agreement.tensors} tensors recomputed, every number is the nearest"
                f" {kind}"
            )
        total = self.agreement.total
        text += (
            f"; {len(self.agreement.modules)} adapted modules recomputed from peft's layers, every"
            " number is "
        )
        text += f"the sum rounded once to {kind}"
        if total.ties:
            text += f" ({total.ties:,} within the arithmetic of fp32)"
        text += (
            f"; {total.share:.1%} of the change arrived, {total.below_rounding:.1%} of it lies"
            " below the rounding"
        )
        if self.agreement.still:
            text += f", and {self.agreement.still} modules stay as they were"
        asked = [error for error in self.answers.values() if not math.isnan(error)]
        if asked:
            text += (
                f"; {len(asked)} modules compared by their answers alone, within {max(asked):.1e}"
            )
        if len(asked) < len(self.answers):
            text += f"; {len(self.answers) - len(asked)} modules compared in the logits alone"
        return text

    @property
    def lost(self) -> str | None:
        """Advice where most of what was trained is not in the stored numbers; None where it is."""
        below = self.agreement.total.below_rounding
        if below < _MUCH_LOST:
            return None
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"{below:.0%} of what was trained is smaller than the rounding of {kind} and is not in"
            " the merged weights; export.dtype=fp32 (of GGUF, export.gguf_type=f32) or"
            " export=adapter keeps it"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedModels:
    """The two models."""

    base_folder: Path
    """Whose ``config.json`` describes the base."""
    base: TensorSource
    adapter: Adapter | None
    merged_folder: Path
    merged: TensorSource
    base_changes: dict[str, Any] = field(default_factory=dict)
    """Keys of the base's ``config.json`` that an adapter with a head of its own changes."""


def measure_parity(
    sides: ComparedModels, tokens: torch.Tensor, dtype: torch.dtype, bound: float | None = None
) -> Parity:
    """Run base and adapter, then the merged model, and compare.

    Args:
        tokens: Shape (rows, positions); see :func:`probe_tokens`.
        dtype: What the merged weights were rounded to.
        bound: Of the logits; None takes what the rounding explains.

    Raises:
        ExportError: They differ by more; the modules are named.
    """
    reference = StreamedModel(sides.base_folder, sides.base, sides.adapter, sides.base_changes)
    agreement, answers = _recompute(sides, reference, dtype)
    expected = reference.logits(tokens, answers.look)
    answers.check()
    del reference
    found = StreamedModel(sides.merged_folder, sides.merged).logits(tokens)
    difference = relative_error(found, expected)

    def shake() -> float:
        source = PerturbedSource(sides.base, dtype)
        model = StreamedModel(sides.base_folder, source, sides.adapter, sides.base_changes)
        return relative_error(model.logits(tokens), expected)

    bound = _check_logits(difference, dtype, bound, shake)
    return Parity(
        logits=difference,
        bound=bound,
        agreement=agreement,
        dtype=dtype,
        answers=answers.errors,
        adapted=sides.adapter is not None,
    )


def _recompute(
    sides: ComparedModels, reference: StreamedModel, dtype: torch.dtype
) -> tuple[Agreement, OutputComparison]:
    """Compare all numbers; and what has to be compared by answers, for want of numbers."""
    expectations = find_expected(reference)
    merged_aliases = tied_aliases(build_skeleton(sides.merged_folder))
    agreement = Recomputation(sides.base, sides.merged, reference.aliases, merged_aliases).run(
        expectations
    )
    agreement.check()
    return agreement, OutputComparison(reference, sides.merged, expectations.unknown, dtype)


def measure_parity_in_memory(
    sides: ComparedModels, tokens: torch.Tensor, dtype: torch.dtype, bound: float | None = None
) -> Parity:
    """The same for architectures that cannot be streamed, with one model in memory at a time.

    Raises:
        ExportError: As :func:`measure_parity`.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    numbers = compare_weights(sides, dtype, alone=False)

    def run(folder: Path, adapter: Adapter | None, shaken: bool = False) -> torch.Tensor:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, trust_remote_code=False
        )
        if shaken:
            perturb_parameters(model, dtype)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter.folder))
        with torch.no_grad():
            logits: torch.Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
        return logits

    expected = run(sides.base_folder, sides.adapter)
    difference = relative_error(run(sides.merged_folder, None), expected)
    bound = _check_logits(
        difference,
        dtype,
        bound,
        lambda: relative_error(run(sides.base_folder, sides.adapter, shaken=True), expected),
    )
    return replace(numbers, logits=difference, bound=bound)


def compare_weights(sides: ComparedModels, dtype: torch.dtype, alone: bool = True) -> Parity:
    """Compare the stored numbers of a model that is not run.

    Args:
        alone: Nothing else is going to be compared.

    Raises:
        ExportError: Some are wrong; or, ``alone``, there are modules whose numbers cannot be
            recomputed.
    """
    skeleton = StreamedModel(sides.base_folder, sides.base, sides.adapter, sides.base_changes)
    agreement, answers = _recompute(sides, skeleton, dtype)
    if alone and answers.units:
        raise ExportError(
            f"parity: what the adapter makes of {some(answers.units)} cannot be recomputed, and the"
            " model cannot be run here; export.parity=false leaves it out"
        )
    return Parity(
        logits=None,
        bound=0.0,
        agreement=agreement,
        dtype=dtype,
        answers=dict.fromkeys(answers.units, math.nan),
        adapted=sides.adapter is not None,
    )


def _check_logits(
    difference: float, dtype: torch.dtype, given: float | None, shake: Callable[[], float]
) -> float:
    """Refuse logits that differ by more than a bound; the bound.

    Args:
        given: By the user; None takes what rounding explains: so many roundings, or, where a model
            answers otherwise at the least (experts that are chosen, attention that is all or
            nothing), a few times what moving its weights by one does.
        shake: Measures that.
    """
    bound = _LOGIT_ROUNDINGS * max(ROUNDING[dtype], _ARITHMETIC) if given is None else given
    if given is None and bound < difference:
        bound = max(bound, _MOST_SHAKES * shake())
    if not difference <= bound:
        raise ExportError(
            "the exported model's logits differ from those of what was trained by"
            f" {difference:.2e}, the bound is {bound:.1e} (export.parity_bound); nothing was"
            " published"
        )
    return bound


def probe_tokens(tokenizer: Any, vocabulary: int, always: list[int]) -> torch.Tensor:
    """Tokens of a few fixed texts, and those whose rows were trained; shape (rows, positions).

    Args:
        tokenizer: None takes numbers spread over the vocabulary.
        always: Tokens that must be among them.
    """
    rows = []
    for number in range(_ROWS):
        ids = (
            list(tokenizer(_TEXTS[number], add_special_tokens=True)["input_ids"])
            if tokenizer is not None
            else []
        )
        ids = [token for token in ids if token < vocabulary][:_POSITIONS]
        # Spread by a number without a common divisor with most vocabulary sizes.
        ids += [
            (7919 * (number * _POSITIONS + place)) % vocabulary
            for place in range(len(ids), _POSITIONS)
        ]
        rows.append(ids)
    for place, token in enumerate(always[: _ROWS * _POSITIONS // 4]):
        rows[place % _ROWS][-1 - place // _ROWS] = token
    return torch.tensor(rows)
