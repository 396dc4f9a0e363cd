"""Recompute every number of a merged model: base and adapter, rounded once to the stored dtype.

A merge computes in fp32 and rounds. The expected result is computed again from peft's layers
(:mod:`llmtune.export.verify.expected_tensors`), a block of rows at a time: first in fp32, and where
the rounded numbers differ, in fp64 with a bound of the error of fp32 arithmetic. A stored number
outside that bound, rounded to either side, is wrong, however small the change is. Inside the bound,
errors of arithmetic have either sign: where they lean towards or away from the change by more than
six times what chance explains, and by more than a thousandth of it, a part of the change is missing
that is too small to be seen in single numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from llmtune.errors import ExportError
from llmtune.export.sources.tensor_source import TensorSource, are_equal, find_name
from llmtune.export.verify.expected_tensors import Expectations, ExpectedTensor, find_start
from llmtune.storage.tensors.row_blocks import row_ranges
from llmtune.units import some

#: Standard deviations that chance may explain, and the share of the change that is ignored.
_SIGMAS, _LEAST_SHARE = 6.0, 1e-3


@dataclass(slots=True, kw_only=True)
class Comparison:
    """The comparison of one tensor, or of several, as sums over its elements."""

    elements: int = 0
    wrong: int = 0
    """Elements that no order of fp32 arithmetic, rounded once, gives."""
    ties: int = 0
    """Elements that differ from the recomputed ones by what fp32 arithmetic explains."""
    changed: int = 0
    """Elements that differ from the base's, rounded."""
    squared_change: float = 0.0
    """Sum of squares of the recomputed change."""
    stored_projection: float = 0.0
    """Projection of the stored change on the recomputed one."""
    rounded_projection: float = 0.0
    """Projection of the recomputed change, rounded, on the recomputed one."""
    squared_loss: float = 0.0
    """The part of ``squared_change`` in elements that keep their value after rounding."""
    drift: float = 0.0
    """Projection of the ties on the recomputed change."""
    variance: float = 0.0
    """Variance of ``drift`` if every sign is random."""

    def add(self, other: Comparison) -> None:
        """Add the sums of another comparison."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def leaning(self) -> bool:
        """Return whether the ties lean one way by more than chance explains."""
        return (
            abs(self.drift)
            > _SIGMAS * math.sqrt(self.variance) + _LEAST_SHARE * self.squared_change
        )

    @property
    def share(self) -> float:
        """Return the stored share of the change, measured along it; it may exceed 1 by rounding."""
        return self.stored_projection / self.squared_change if self.squared_change else 1.0

    @property
    def below_rounding(self) -> float:
        """Return the share of the squared change in elements that keep their value."""
        return self.squared_loss / self.squared_change if self.squared_change else 0.0

    def describe(self) -> str:
        """Describe the problem of one tensor."""
        text = f"{self.wrong:,} of {self.elements:,} numbers are not the sum rounded once"
        if not self.wrong:
            text = "its numbers lean away from the sum"
        if self.squared_change:
            expected = self.rounded_projection / self.squared_change
            text += f"; {self.share:.0%} of its change arrived, {expected:.0%} should have"
        return text


@dataclass(slots=True)
class Agreement:
    """The comparison of a whole model."""

    modules: dict[str, Comparison] = field(default_factory=dict)
    """One per adapted module whose tensors were recomputed."""
    tensors: int = 0
    """Number of compared tensors."""
    problems: list[str] = field(default_factory=list)

    @property
    def total(self) -> Comparison:
        """Return the sums over all adapted modules."""
        total = Comparison()
        for one in self.modules.values():
            total.add(one)
        return total

    @property
    def unchanged(self) -> int:
        """Count modules that the adapter changes, and that are stored without any change."""
        return sum(one.squared_change > 0 and not one.changed for one in self.modules.values())

    def check(self) -> None:
        """Refuse a model that is not base and adapter.

        Raises:
            ExportError: Some of the tensors with a problem are named.
        """
        if self.problems:
            raise ExportError(
                f"the merged model is not base and adapter: {len(self.problems)} of {self.tensors}"
                f" tensors are not what the base and peft's layers come to: {some(self.problems)};"
                " nothing was published"
            )


class Recomputation:
    """Compares all tensors of a merged model with base and adapter."""

    def __init__(
        self,
        base: TensorSource,
        merged: TensorSource,
        base_aliases: dict[str, list[str]],
        merged_aliases: dict[str, list[str]],
    ) -> None:
        """Prepare the comparison.

        Args:
            base_aliases: Parameter of the base -> other names of the same parameter.
            merged_aliases: The same for the merged model, as its own ``config.json`` says.
        """
        self._base, self._merged = base, merged
        self._base_aliases, self._merged_aliases = base_aliases, merged_aliases
        self._result = Agreement()
        self._seen: set[str] = set()
        self._used: set[str] = set()

    def run(self, expectations: Expectations) -> Agreement:
        """Compare all tensors but those of unknown wrappers."""
        owners = {name: module for module, names in expectations.modules.items() for name in names}
        self._result.modules = {module: Comparison() for module in expectations.modules}
        for name, expected in expectations.tensors.items():
            self._compare_expected(expected, owners.get(name))
        self._skip_unknown(expectations)
        for name in self._merged.specs:
            if name not in self._seen:
                self._compare_untouched(name)
        for name in sorted(self._base.specs.keys() - self._merged.specs.keys() - self._used):
            if not self._is_copy(name):
                self._result.tensors += 1
                self._result.problems.append(f"{name} is in the base and not in the merged model")
        return self._result

    def _is_copy(self, name: str) -> bool:
        """Return whether the base stores a tied matrix twice, of which the model has the other."""
        for parameter, others in self._merged_aliases.items():
            if find_name(parameter, self._base.specs) != name:
                continue
            for other in others:
                stored = find_name(other, self._base.specs)
                if stored is None or stored not in self._merged.specs:
                    continue
                if are_equal(self._base, name, stored):
                    return True
        return False

    def _skip_unknown(self, expectations: Expectations) -> None:
        """Mark the tensors of unknown wrappers as compared."""
        stems = tuple(f"{name}." for unit in expectations.unknown for name, _ in unit.inner)
        for names, seen in ((self._merged.specs, self._seen), (self._base.specs, self._used)):
            seen |= {name for name in names if stems and name.startswith(stems)}

    def _compare_expected(self, expected: ExpectedTensor, module: str | None) -> None:
        start = find_start(expected, self._base, self._base_aliases)
        stored = self._stored(expected.name)
        if start is not None:
            self._used.add(start)
        if not stored:
            self._result.tensors += 1
            self._result.problems.append(f"{expected.name} is not in the merged model")
        for name in stored:
            self._seen.add(name)
            self._record(
                name, compare_tensor(expected, self._base, start, self._merged, name), module
            )

    def _stored(self, name: str) -> list[str]:
        """Return every tensor of the merged model that a loader may take for this parameter."""
        parameters = [name, *self._merged_aliases.get(name, ())]
        stored = [find_name(parameter, self._merged.specs) for parameter in parameters]
        return list(dict.fromkeys(tensor for tensor in stored if tensor is not None))

    def _compare_untouched(self, name: str) -> None:
        if name not in self._base.specs:
            self._result.tensors += 1
            self._result.problems.append(f"{name} is in the merged model and not in the base")
            return
        self._record(
            name,
            compare_tensor(ExpectedTensor(name=name), self._base, name, self._merged, name),
            None,
        )

    def _record(self, name: str, comparison: Comparison | str, module: str | None) -> None:
        self._result.tensors += 1
        if isinstance(comparison, str):
            self._result.problems.append(f"{name} ({comparison})")
            return
        if comparison.wrong or comparison.leaning:
            self._result.problems.append(f"{name} ({comparison.describe()})")
        if module is not None:
            self._result.modules[module].add(comparison)


def compare_tensor(
    expected: ExpectedTensor, base: TensorSource, start: str | None, merged: TensorSource, name: str
) -> Comparison | str:
    """Compare one stored tensor with the recomputed one.

    Args:
        start: The base's tensor that it starts from; None where the base has none.
        name: The stored tensor.

    Returns:
        The comparison, or the reason why the two cannot be compared.
    """
    # Shape and dtype are decided before any row is read.
    spec = merged.specs[name]
    if expected.start is not None:
        shape = tuple(expected.start.shape)
    elif start:
        shape = base.specs[start].shape
    else:
        return "neither the base nor the adapter has it"
    if spec.shape != shape:
        return f"its shape is {spec.shape}, and should be {shape}"
    if (
        not spec.dtype.is_floating_point
        and start is not None
        and base.specs[start].dtype != spec.dtype
    ):
        return f"it is stored as {spec.dtype}, in the base as {base.specs[start].dtype}"

    # Lengths of DoRA over all rows need one pass before.
    if expected.delta is not None:
        expected.delta.measure(_start_rows(expected, base, start, spec.shape))
    start_rows = _RowReader(_start_rows(expected, base, start, spec.shape))
    # A tensor that the adapter brings is counted as a change of the base's, if it has one.
    base_rows = start_rows
    if start and expected.start is not None and base.specs[start].shape == shape:
        base_rows = _RowReader(base.blocks(start))

    # Block by block, as the merged file has them.
    total, first = Comparison(), 0
    for block in merged.blocks(name):
        count = len(block) if block.ndim else 1
        rows = start_rows.take(count)
        origin = rows if base_rows is start_rows else base_rows.take(count)
        stored = block.reshape(rows.shape).to(spec.dtype)
        total.add(_compare_rows(expected, rows, origin, stored, first))
        first += count
    return total


def _compare_rows(
    expected: ExpectedTensor,
    start: torch.Tensor,
    origin: torch.Tensor,
    stored: torch.Tensor,
    first: int,
) -> Comparison:
    """Compare some rows of one tensor.

    Args:
        start: The rows that the computation starts from.
        origin: The base's rows, from which the change is measured.
        stored: The rows of the merged model.
        first: The index of the first of them.
    """
    result = Comparison(elements=stored.numel())
    if not expected.adapted:
        result.wrong = int(start.to(stored.dtype).ne(stored).sum())
        return result

    # In fp32: the change, and what of it is stored.
    quick = expected.quick(start, first)
    rounded = quick.to(stored.dtype)
    differs = rounded.ne(stored)
    plain = origin.float()
    change = (quick - plain).reshape(-1)
    still = origin.to(stored.dtype).eq(stored)
    result.changed = stored.numel() - int(still.sum())
    result.squared_change = _dot(change, change)
    result.stored_projection = _dot((stored.float() - plain).reshape(-1), change)
    result.rounded_projection = _dot((rounded.float() - plain).reshape(-1), change)
    lost = change * still.reshape(-1)
    result.squared_loss = _dot(lost, lost)
    if not bool(differs.any()):
        return result

    # In fp64, where rounded numbers differ: whether fp32 arithmetic explains the differences.
    exact, slack = expected.exact(start, first)
    low = (exact - slack).to(stored.dtype).double()
    high = (exact + slack).to(stored.dtype).double()
    values = stored.double()
    right = (low <= values) & (values <= high)
    errors = torch.where(right, values - exact.to(stored.dtype).double(), 0.0)
    off = errors * (exact - origin.double())
    result.wrong = int((~right).sum())
    result.ties = int((differs & right).sum())
    result.drift, result.variance = float(off.sum()), float(off.square().sum())
    return result


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.dot(one, other))


def _start_rows(
    expected: ExpectedTensor, base: TensorSource, start: str | None, shape: tuple[int, ...]
) -> Iterator[torch.Tensor]:
    if expected.start is None:
        assert start is not None
        yield from (block if block.ndim else block.reshape(1) for block in base.blocks(start))
        return
    tensor = expected.start if expected.start.ndim else expected.start.reshape(1)
    for first, last in row_ranges(shape):
        yield tensor[first:last]


class _RowReader:
    """Reads blocks of rows, and returns them in blocks of other sizes."""

    def __init__(self, blocks: Iterator[torch.Tensor]) -> None:
        self._blocks = blocks
        self._rest: torch.Tensor | None = None

    def take(self, count: int) -> torch.Tensor:
        """Return the next ``count`` rows."""
        parts: list[torch.Tensor] = []
        missing = count
        while missing:
            block = self._rest if self._rest is not None else next(self._blocks)
            block = block if block.ndim else block.reshape(1)
            parts.append(block[:missing])
            self._rest = block[missing:] if len(block) > missing else None
            missing -= len(parts[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)
