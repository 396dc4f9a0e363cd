"""Measure the parity of a merged model with base and adapter: its stored numbers, and its logits.

Numbers are recomputed from peft's own layers (:mod:`llmtune.export.verify.recompute`): that
distinguishes the smallest lost change from rounding, which outputs cannot do. The logits show what
numbers cannot: that the folder's configuration makes the same function of them. Both models are
streamed, so that neither has to fit into memory; base and adapter run in peft, which does not use
our merge. All arithmetic is fp32, so that the difference that remains is the rounding of the stored
weights. A number rounded to ``p`` bits is off by at most ``u = 2**-p`` of itself, at random, so a
matrix product by about ``u / sqrt(3)``; the bound of the logits is a few times that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llmtune.errors import ExportError
from llmtune.export.merge.adapter import Adapter
from llmtune.export.sources.tensor_source import TensorSource
from llmtune.export.verify.expected_stacks import expect_stacks
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
from llmtune.units import some

#: Relative error of one rounding.
ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-24}

#: Relative error of summing fp32 products in another order.
_ARITHMETIC = 1e-5

#: Bound of the logits in roundings: those of a deep model gather the errors of all modules.
_LOGIT_ROUNDINGS = 48

#: Bound of the logits in effects of one random rounding, for models that amplify rounding.
_MOST_PERTURBATIONS = 4.0

#: Share of the change below rounding from which on the user is advised to store more digits.
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
    """The results of a comparison that was passed."""

    logits: float | None
    """Largest relative difference of a position's logits without their mean.

    It is None where only numbers were compared.
    """
    bound: float
    """The largest difference of the logits that would have been accepted."""
    agreement: Agreement
    """The stored numbers compared with recomputed ones."""
    dtype: torch.dtype
    """The dtype that the numbers were rounded to."""
    output_errors: dict[str, float]
    """Module whose numbers could not be recomputed -> relative difference of its outputs."""
    adapted: bool
    """True if an adapter was merged; without one, only the rounding was compared."""
    quantized: str | None = None
    """The coarser type that the compared numbers are then stored in; None if there is none."""

    def describe(self) -> str:
        """Return one line for the console and the card: the checks, and the stored share."""
        text = self._describe_logits()
        text += self._describe_numbers() if self.adapted else self._describe_rounding()
        if self.quantized:
            text += (
                f". That is of the numbers before they are stored as {self.quantized}, which is not"
                " compared"
            )
        return text

    def _describe_logits(self) -> str:
        if self.logits is None:
            return "logits not compared"
        reference = "base and adapter" if self.adapted else "the weights before they were rounded"
        return f"logits within {self.logits:.1e} of {reference} (bound {self.bound:.1e})"

    def _describe_rounding(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"; {self.agreement.tensors} tensors recomputed, every number is the nearest {kind}"

    def _describe_numbers(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        total = self.agreement.total
        text = (
            f"; {len(self.agreement.modules)} adapted modules recomputed from peft's layers, every"
            f" number is the sum rounded once to {kind}"
        )
        if total.ties:
            text += f" ({total.ties:,} within the arithmetic of fp32)"
        text += (
            f"; {total.share:.1%} of the change arrived, {total.below_rounding:.1%} of it is"
            " below the rounding"
        )
        if self.agreement.unchanged:
            text += f", and {self.agreement.unchanged} modules stay as they were"
        errors = [error for error in self.output_errors.values() if not math.isnan(error)]
        if errors:
            text += (
                f"; {len(errors)} modules compared by their outputs alone, within {max(errors):.1e}"
            )
        only_logits = len(self.output_errors) - len(errors)
        if only_logits:
            text += f"; {only_logits} modules compared in the logits alone"
        return text

    @property
    def loss_note(self) -> str | None:
        """Return advice where rounding loses most of what was trained; None where it does not."""
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
    """Base and adapter, and the merged model that is compared with them."""

    base_folder: Path
    """Model folder of the base; its ``config.json`` is used."""
    base: TensorSource
    adapter: Adapter | None
    merged_folder: Path
    merged: TensorSource
    base_changes: dict[str, Any] = field(default_factory=dict)
    """Keys of the base's ``config.json`` that an adapter with its own head changes."""


def measure_parity(
    models: ComparedModels, tokens: torch.Tensor, dtype: torch.dtype, bound: float | None = None
) -> Parity:
    """Run base and adapter, then the merged model, and compare numbers and logits.

    Args:
        tokens: Shape (rows, positions); see :func:`probe_tokens`.
        dtype: The dtype that the merged weights were rounded to.
        bound: Largest relative difference of the logits; None takes what rounding explains.

    Raises:
        ExportError: They differ by more; the modules are named.
    """
    reference = StreamedModel(models.base_folder, models.base, models.adapter, models.base_changes)
    agreement, outputs = _recompute(models, reference, dtype)
    expected = reference.logits(tokens, outputs.compare)
    outputs.check()
    del reference
    logits = StreamedModel(models.merged_folder, models.merged).logits(tokens)
    difference = relative_error(logits, expected)

    def perturb() -> float:
        source = PerturbedSource(models.base, dtype)
        model = StreamedModel(models.base_folder, source, models.adapter, models.base_changes)
        return relative_error(model.logits(tokens), expected)

    bound = _resolve_bound(difference, dtype, bound, perturb)
    return Parity(
        logits=difference,
        bound=bound,
        agreement=agreement,
        dtype=dtype,
        output_errors=outputs.errors,
        adapted=models.adapter is not None,
    )


def _recompute(
    models: ComparedModels, reference: StreamedModel, dtype: torch.dtype
) -> tuple[Agreement, OutputComparison]:
    """Compare all numbers; return also the comparison of modules that cannot be recomputed.

    Raises:
        ExportError: A number is wrong.
    """
    expectations = find_expected(reference.units, reference.aliases)
    expect_stacks(expectations, reference.model, models.base.specs)
    merged_aliases = tied_aliases(build_skeleton(models.merged_folder))
    agreement = Recomputation(models.base, models.merged, reference.aliases, merged_aliases).run(
        expectations
    )
    agreement.check()
    return agreement, OutputComparison(
        reference.run_unit, models.merged, expectations.unknown, dtype
    )


def measure_parity_in_memory(
    models: ComparedModels, tokens: torch.Tensor, dtype: torch.dtype, bound: float | None = None
) -> Parity:
    """Measure the parity of architectures that cannot be streamed, one model in memory at a time.

    Raises:
        ExportError: As :func:`measure_parity`.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    numbers = compare_weights(models, dtype, only_weights=False)

    def run(folder: Path, adapter: Adapter | None, perturbed: bool = False) -> torch.Tensor:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, trust_remote_code=False
        )
        if perturbed:
            perturb_parameters(model, dtype)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter.folder))
        with torch.no_grad():
            logits: torch.Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
        return logits

    # One model at a time: only the logits of each are kept.
    expected = run(models.base_folder, models.adapter)
    difference = relative_error(run(models.merged_folder, None), expected)

    def perturb() -> float:
        return relative_error(run(models.base_folder, models.adapter, perturbed=True), expected)

    bound = _resolve_bound(difference, dtype, bound, perturb)
    return replace(numbers, logits=difference, bound=bound)


def compare_weights(
    models: ComparedModels, dtype: torch.dtype, only_weights: bool = True
) -> Parity:
    """Compare the stored numbers of a model, without running it.

    Args:
        only_weights: The logits are not going to be compared either.

    Raises:
        ExportError: A number is wrong; or, with ``only_weights``, some modules cannot be
            recomputed.
    """
    skeleton = StreamedModel(models.base_folder, models.base, models.adapter, models.base_changes)
    agreement, outputs = _recompute(models, skeleton, dtype)
    if only_weights and outputs.units:
        raise ExportError(
            f"parity: what the adapter makes of {some(outputs.units)} cannot be recomputed, and the"
            " model cannot be run here; export.parity=false leaves it out"
        )
    return Parity(
        logits=None,
        bound=0.0,
        agreement=agreement,
        dtype=dtype,
        output_errors=dict.fromkeys(outputs.units, math.nan),
        adapted=models.adapter is not None,
    )


def _resolve_bound(
    difference: float, dtype: torch.dtype, bound: float | None, perturb: Callable[[], float]
) -> float:
    """Return the bound of the logits that the user set, or that rounding explains.

    Some models amplify rounding, such as those that choose experts. Where the difference exceeds
    the bound of ordinary models, that of this model is measured.

    Args:
        perturb: Measures the effect of moving all weights by up to half an ULP.

    Raises:
        ExportError: The difference is larger than the bound.
    """
    if bound is None:
        bound = _LOGIT_ROUNDINGS * max(ROUNDING[dtype], _ARITHMETIC)
        if bound < difference:
            bound = max(bound, _MOST_PERTURBATIONS * perturb())
    # NaN is not smaller than anything.
    if not difference <= bound:
        raise ExportError(
            "the exported model's logits differ from those of what was trained by"
            f" {difference:.2e}, the bound is {bound:.1e} (export.parity_bound); nothing was"
            " published"
        )
    return bound


def probe_tokens(tokenizer: Any, vocabulary: int, trained: list[int]) -> torch.Tensor:
    """Return tokens of a few fixed texts, and trained tokens; shape (rows, positions).

    Args:
        tokenizer: None takes ids spread over the vocabulary.
        vocabulary: Number of rows of the embedding.
        trained: Tokens whose rows were trained; as many of them as a quarter of all positions.
    """
    rows = []
    for row in range(_ROWS):
        ids: list[int] = []
        if tokenizer is not None:
            ids += tokenizer(_TEXTS[row], add_special_tokens=True)["input_ids"]
        ids = [token for token in ids if token < vocabulary][:_POSITIONS]
        # 7919 is prime, and so without a common divisor with most vocabulary sizes.
        for position in range(len(ids), _POSITIONS):
            ids.append((7919 * (row * _POSITIONS + position)) % vocabulary)
        rows.append(ids)
    for index, token in enumerate(trained[: _ROWS * _POSITIONS // 4]):
        rows[index % _ROWS][-1 - index // _ROWS] = token
    return torch.tensor(rows)
