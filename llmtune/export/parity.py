"""Whether what was merged computes what base and adapter compute: module by module on the same input, and in the logits.

Both models are streamed, so that neither has to fit; base and adapter run in peft, which knows nothing of our merge. All
arithmetic is fp32, so that what is left is the rounding of the stored weights. A number rounded to ``p`` bits is off by at
most ``u = 2**-p`` of itself, at random, so a matrix product by about ``u / sqrt(3)``; the bounds are a few times that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmtune.errors import ExportError
from llmtune.export.adapter import Adapter
from llmtune.export.streamed_model import StreamedModel, Unit
from llmtune.export.tensors import TensorSource, some

#: Relative error of one rounding.
ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-24}

#: Two orders of summing the same fp32 products.
_ARITHMETIC = 1e-5

#: A module's answer may be off by this many roundings; and a change larger than two must be there, not half of it missing.
_MODULE_ROUNDINGS = 4
#: The logits of a deep model gather the errors of all modules.
_LOGIT_ROUNDINGS = 48

_ROWS, _POSITIONS = 4, 24
_TEXTS = (
    "The committee met on Tuesday to discuss the proposal. After three hours of debate, most members agreed that the plan "
    "needed further work before it could be adopted, and the chair asked for a new draft by the end of the month.",
    "def merge(left, right):\n    result = []\n    while left and right:\n        result.append((left if left[0] <= right[0] "
    "else right).pop(0))\n    return result + left + right\n\nprint(merge([1, 4, 9], [2, 3, 10]))",
    "Question: A train leaves at 14:35 and takes 2 hours and 50 minutes. When does it arrive?\nAnswer: It arrives at 17:25, "
    "because 14:35 plus 2:50 is 17:25. Question: How many minutes is that in all? Answer: 170 minutes, or 10,200 seconds.",
    "Les élèves ont visité le musée hier. Морской воздух был холодным и солёным. 今日は天気がいいですね。 El perro duerme "
    "bajo la mesa, y nadie quiere despertarlo; mañana será otro día. Wo ist der Bahnhof, bitte? Straße, Fuß, Öl.",
)


@dataclass(frozen=True, slots=True)
class Parity:
    """What was compared, and how near it came."""

    logits: float
    """Largest relative difference of a position's logits, their mean taken off."""
    bound: float
    module: float
    """Largest relative difference of a module's answer; 0 where no module could be compared by itself."""
    modules: int
    hidden: int
    """Modules whose change is smaller than the rounding of the stored dtype, so that the merge loses it."""
    adapted: bool
    """Whether an adapter was merged; without one, what was compared is the rounding alone."""

    def describe(self) -> str:
        """One line for the console and the card."""
        of = "base and adapter" if self.adapted else "the weights before they were rounded"
        text = f"logits within {self.logits:.1e} of {of} (bound {self.bound:.1e})"
        if self.modules:
            text += f", {self.modules} modules within {self.module:.1e}"
        if self.hidden:
            text += f"; {self.hidden} of them change by less than a rounding"
        return text


@dataclass(frozen=True, slots=True)
class Sides:
    """The two models."""

    base_folder: Path
    """Whose ``config.json`` describes the base."""
    base: TensorSource
    adapter: Adapter | None
    merged_folder: Path
    merged: TensorSource
    base_changes: dict[str, Any] = field(default_factory=dict)
    """Keys of the base's ``config.json`` that an adapter with a head of its own changes."""


def check_parity(sides: Sides, tokens: torch.Tensor, dtype: torch.dtype, bound: float | None = None) -> Parity:
    """Run base and adapter, then the merged model, and compare.

    Args:
        tokens: Shape (rows, positions); see :func:`probe_tokens`.
        dtype: What the merged weights were rounded to.
        bound: Of the logits; None takes what the rounding explains.

    Raises:
        ExportError: They differ by more; the modules are named.
    """
    rounding = max(ROUNDING[dtype], _ARITHMETIC)
    bound = _LOGIT_ROUNDINGS * rounding if bound is None else bound
    reference = StreamedModel(sides.base_folder, sides.base, sides.adapter, sides.base_changes)
    comparison = _Comparison(reference, sides.merged, rounding)
    expected = reference.logits(tokens, comparison.look)
    if comparison.problems:
        raise ExportError(
            f"the merged model is not base and adapter: {len(comparison.problems)} of {comparison.modules} modules answer "
            f"otherwise: {some(comparison.problems)}; nothing was published"
        )
    found = StreamedModel(sides.merged_folder, sides.merged).logits(tokens)
    difference = _relative(found, expected)
    _check_logits(difference, bound)
    return Parity(difference, bound, comparison.worst, comparison.modules, comparison.hidden, sides.adapter is not None)


def compare_whole(sides: Sides, tokens: torch.Tensor, dtype: torch.dtype, bound: float | None = None) -> Parity:
    """The same for architectures that cannot be streamed: logits only, and one model in memory at a time.

    Raises:
        ExportError: As :func:`check_parity`; or the merged tensors are not in a folder yet.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if not list(sides.merged_folder.glob("*.safetensors")):
        raise ExportError(
            "parity of this architecture is only checked with export=safetensors; take export.parity=false"
        )
    bound = _LOGIT_ROUNDINGS * max(ROUNDING[dtype], _ARITHMETIC) if bound is None else bound

    def run(folder: Path, adapter: Adapter | None) -> torch.Tensor:
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, trust_remote_code=False)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter.folder))
        with torch.no_grad():
            logits: torch.Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
        return logits

    difference = _relative(run(sides.merged_folder, None), run(sides.base_folder, sides.adapter))
    _check_logits(difference, bound)
    return Parity(difference, bound, 0.0, 0, 0, sides.adapter is not None)


def _check_logits(difference: float, bound: float) -> None:
    if not difference <= bound:
        raise ExportError(
            f"the exported model's logits differ from those of what was trained by {difference:.2e}, the bound is {bound:.1e} "
            "(export.parity_bound); nothing was published"
        )


def probe_tokens(tokenizer: Any, vocabulary: int, always: list[int]) -> torch.Tensor:
    """Tokens of a few fixed texts, and those whose rows were trained; shape (rows, positions).

    Args:
        tokenizer: None takes numbers spread over the vocabulary.
        always: Tokens that must be among them.
    """
    rows = []
    for number in range(_ROWS):
        ids = list(tokenizer(_TEXTS[number], add_special_tokens=True)["input_ids"]) if tokenizer is not None else []
        ids = [token for token in ids if token < vocabulary][:_POSITIONS]
        # Spread by a number without a common divisor with most vocabulary sizes.
        ids += [(7919 * (number * _POSITIONS + place)) % vocabulary for place in range(len(ids), _POSITIONS)]
        rows.append(ids)
    for place, token in enumerate(always[: _ROWS * _POSITIONS // 4]):
        rows[place % _ROWS][-1 - place // _ROWS] = token
    return torch.tensor(rows)


class _Comparison:
    """Asks every wrapped module what it would answer with merged weights, while the reference runs."""

    def __init__(self, reference: StreamedModel, merged: TensorSource, rounding: float) -> None:
        self._reference = reference
        self._merged = merged
        self._rounding = rounding
        self.problems: list[str] = []
        self.modules = self.hidden = 0
        self.worst = 0.0

    def look(self, unit: Unit, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
        """Compare one module's answers."""
        if not unit.wrapped or len(unit.inner) != 1:
            return
        found = self._reference.with_weights_of(self._merged, unit, arguments)
        error = _relative(found, output, centred=False)
        effect = self._effect(unit, arguments, output)
        self.modules += 1
        self.worst = max(self.worst, error)
        self.hidden += effect < self._rounding
        missing = effect > 2 * self._rounding and error > effect / 2
        if not error <= _MODULE_ROUNDINGS * self._rounding or missing:
            self.problems.append(f"{unit.inner[0][0]} (off by {error:.1e}, the adapter changes it by {effect:.1e})")

    def _effect(self, unit: Unit, arguments: tuple[Any, ...], output: torch.Tensor) -> float:
        """How much the adapter changes this module's answer; infinite where the base cannot answer, as for new tokens."""
        try:
            plain = unit.inner[0][1](*arguments)
        except IndexError:
            return math.inf
        return _relative(plain, output, centred=False)


def _relative(found: torch.Tensor, expected: torch.Tensor, centred: bool = True) -> float:
    """Largest over positions of the length of the difference by the length of what is expected; NaN is the largest.

    Args:
        centred: Take the mean off first; logits mean the same with any number added, unless there is only one.
    """
    if centred and expected.shape[-1] > 1:
        found, expected = found - found.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True)
    lengths = expected.norm(dim=-1)
    # A position whose answer is nearly nothing has no relative error to speak of.
    ratio = (found - expected).norm(dim=-1) / lengths.clamp(min=float(lengths.max()) * 1e-3)
    return float(ratio.max()) if bool(torch.isfinite(ratio).all()) else math.nan
