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
from llmtune.export.sources.tensor_source import TensorSource, find_name, some
from llmtune.export.verify.expected_tensors import Expectations, ExpectedTensor, base_rows
from llmtune.storage.row_blocks import row_ranges

# : Standard deviations that chance is allowed, and the share of the change below which nothing is
# made of it.
_SIGMAS, _LEAST_SHARE = 6.0, 1e-3


@dataclass(slots=True, kw_only=True)
class Comparison:
    """One tensor, or all of them: what was found, as sums over its numbers."""

    numbers: int = 0
    wrong: int = 0
    """Numbers that no order of fp32 arithmetic, rounded once, gives."""
    ties: int = 0
    """Numbers that differ from the recomputed ones by what fp32 arithmetic explains."""
    moved: int = 0
    """Numbers that are not the base's, rounded."""
    wanted: float = 0.0
    """Sum of squares of the change."""
    arrived: float = 0.0
    """Projection of the stored change on the wanted one."""
    due: float = 0.0
    """The same of the wanted change, rounded."""
    lost: float = 0.0
    """The part of ``wanted`` in numbers that rounding leaves where they were."""
    drift: float = 0.0
    """Projection of the ties on the wanted change."""
    variance: float = 0.0
    """Of ``drift``, were every sign an accident."""

    def add(self, other: Comparison) -> None:
        """Put sums together."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def leaning(self) -> bool:
        """Whether the ties lean one way."""
        return abs(self.drift) > _SIGMAS * math.sqrt(self.variance) + _LEAST_SHARE * self.wanted

    @property
    def share(self) -> float:
        """Of the wanted change, how much is stored, measured along it; rounding up makes it more
        than 1.
        """
        return self.arrived / self.wanted if self.wanted else 1.0

    @property
    def below_rounding(self) -> float:
        """The share of the change, in squares, that falls on numbers which rounding leaves as they
        were.
        """
        return self.lost / self.wanted if self.wanted else 0.0

    def describe(self) -> str:
        """What is wrong with one tensor."""
        text = f"{self.wrong:,} of {self.numbers:,} numbers are not the sum rounded once"
        if not self.wrong:
            text = "its numbers lean away from the sum"
        if self.wanted:
            text += (
                f"; {self.share:.0%} of its change arrived, {self.due / self.wanted:.0%} should"
                " have"
            )
        return text


@dataclass(slots=True)
class Agreement:
    """A whole model."""

    modules: dict[str, Comparison] = field(default_factory=dict)
    """Of every adapted module whose tensors were recomputed."""
    tensors: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def total(self) -> Comparison:
        """All adapted modules together."""
        total = Comparison()
        for one in self.modules.values():
            total.add(one)
        return total

    @property
    def still(self) -> int:
        """Modules that the adapter changes, and the stored dtype does not show."""
        return sum(one.wanted > 0 and not one.moved for one in self.modules.values())

    def check(self) -> None:
        """Refuse.

        Raises:
            ExportError: A tensor is not what it must be; some are named.
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
        """Take both models.

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
        """Compare everything; tensors of modules that are not known here are left to other
        checks.
        """
        owners = {name: module for module, names in expectations.modules.items() for name in names}
        self._result.modules = {module: Comparison() for module in expectations.modules}
        for name, expected in expectations.tensors.items():
            self._check_expected(expected, owners.get(name))
        self._set_aside(expectations)
        for name in self._merged.specs:
            if name not in self._seen:
                self._check_untouched(name)
        for name in sorted(self._base.specs.keys() - self._merged.specs.keys() - self._used):
            if not self._is_copy(name):
                self._result.tensors += 1
                self._result.problems.append(f"{name} is in the base and not in the merged model")
        return self._result

    def _is_copy(self, name: str) -> bool:
        """Whether the base stores a tied matrix twice, of which the first is enough."""
        for parameter, others in self._merged_aliases.items():
            if find_name(parameter, self._base.specs) != name:
                continue
            found = [
                one
                for one in (find_name(other, self._base.specs) for other in others)
                if one is not None
            ]
            if any(one in self._merged.specs and _equal(self._base, name, one) for one in found):
                return True
        return False

    def _set_aside(self, expectations: Expectations) -> None:
        """Tensors of unknown wrappers may be anything here."""
        stems = tuple(f"{name}." for unit in expectations.unknown for name, _ in unit.inner)
        for names, seen in ((self._merged.specs, self._seen), (self._base.specs, self._used)):
            seen |= {name for name in names if stems and name.startswith(stems)}

    def _check_expected(self, expected: ExpectedTensor, module: str | None) -> None:
        start = base_rows(expected, self._base, self._base_aliases)
        stored = self._stored(expected.name)
        if start is not None:
            self._used.add(start)
        if not stored:
            self._result.tensors += 1
            self._result.problems.append(f"{expected.name} is not in the merged model")
        for name in stored:
            self._seen.add(name)
            self._note(
                name, compare_tensor(expected, self._base, start, self._merged, name), module
            )

    def _stored(self, name: str) -> list[str]:
        """Every tensor of the merged model that a loader may take for this parameter; all of them
        must be right.
        """
        tries = [name, *self._merged_aliases.get(name, ())]
        found = [find_name(one, self._merged.specs) for one in tries]
        return list(dict.fromkeys(one for one in found if one is not None))

    def _check_untouched(self, name: str) -> None:
        if name not in self._base.specs:
            self._result.tensors += 1
            self._result.problems.append(f"{name} is in the merged model and not in the base")
            return
        self._note(
            name,
            compare_tensor(ExpectedTensor(name=name), self._base, name, self._merged, name),
            None,
        )

    def _note(self, name: str, found: Comparison | str, module: str | None) -> None:
        self._result.tensors += 1
        if isinstance(found, str):
            self._result.problems.append(f"{name} ({found})")
            return
        if found.wrong or found.leaning:
            self._result.problems.append(f"{name} ({found.describe()})")
        if module is not None:
            self._result.modules[module].add(found)


def _equal(source: TensorSource, one: str, other: str) -> bool:
    return source.specs[one].shape == source.specs[other].shape and all(
        map(torch.equal, source.blocks(one), source.blocks(other))
    )


def compare_tensor(
    expected: ExpectedTensor, base: TensorSource, start: str | None, merged: TensorSource, name: str
) -> Comparison | str:
    """Compare one stored tensor with what it must be; a text where the two cannot be compared.

    Args:
        start: The base's tensor that it starts from; None where the base has none.
        name: The stored tensor.
    """
    spec = merged.specs[name]
    shape = (
        tuple(expected.start.shape)
        if expected.start is not None
        else base.specs[start].shape
        if start
        else None
    )
    if shape is None:
        return "neither the base nor the adapter has it"
    if spec.shape != shape:
        return f"its shape is {spec.shape}, and should be {shape}"
    if (
        not spec.dtype.is_floating_point
        and start is not None
        and base.specs[start].dtype != spec.dtype
    ):
        return f"it is stored as {spec.dtype}, in the base as {base.specs[start].dtype}"
    if expected.delta is not None:
        expected.delta.measure(_start_rows(expected, base, start, spec.shape))
    rows = _Rows(_start_rows(expected, base, start, spec.shape))
    # A change is counted from the base's numbers, where it has as many.
    before = (
        _Rows(base.blocks(start))
        if start and expected.start is not None and base.specs[start].shape == shape
        else rows
    )
    total, first = Comparison(), 0
    for block in merged.blocks(name):
        count = len(block) if block.ndim else 1
        given = rows.take(count)
        origin = given if before is rows else before.take(count)
        total.add(
            _compare_rows(expected, given, origin, block.reshape(given.shape).to(spec.dtype), first)
        )
        first += count
    return total


def _compare_rows(
    expected: ExpectedTensor,
    given: torch.Tensor,
    origin: torch.Tensor,
    stored: torch.Tensor,
    first: int,
) -> Comparison:
    """Rows of one tensor: given to start from, of the base, and as they are stored."""
    found = Comparison(numbers=stored.numel())
    if not expected.adapted:
        found.wrong = int(given.to(stored.dtype).ne(stored).sum())
        return found
    quick = expected.quick(given, first)
    rounded = quick.to(stored.dtype)
    differs = rounded.ne(stored)
    plain = origin.float()
    change = (quick - plain).reshape(-1)
    still = origin.to(stored.dtype).eq(stored)
    found.moved = stored.numel() - int(still.sum())
    found.wanted = _dot(change, change)
    found.arrived = _dot((stored.float() - plain).reshape(-1), change)
    found.due = _dot((rounded.float() - plain).reshape(-1), change)
    held = change * still.reshape(-1)
    found.lost = _dot(held, held)
    if bool(differs.any()):
        exact, slack = expected.exact(given, first)
        low, high = ((exact + sign * slack).to(stored.dtype).double() for sign in (-1, 1))
        number = stored.double()
        right = (low <= number) & (number <= high)
        off = torch.where(right, number - exact.to(stored.dtype).double(), 0.0) * (
            exact - origin.double()
        )
        found.wrong = int((~right).sum())
        found.ties = int((differs & right).sum())
        found.drift, found.variance = float(off.sum()), float(off.square().sum())
    return found


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.dot(one, other))


def _start_rows(
    expected: ExpectedTensor, base: TensorSource, start: str | None, shape: tuple[int, ...]
) -> Iterator[torch.Tensor]:
    if expected.start is None:
        assert start is not None
        yield from (block if block.ndim else block.reshape(1) for block in base.blocks(start))
        return
    whole = expected.start if expected.start.ndim else expected.start.reshape(1)
    for first, last in row_ranges(shape):
        yield whole[first:last]


class _Rows:
    """Blocks of rows, handed out in other numbers of rows than they come in."""

    def __init__(self, blocks: Iterator[torch.Tensor]) -> None:
        self._blocks = blocks
        self._rest: torch.Tensor | None = None

    def take(self, count: int) -> torch.Tensor:
        """The next ``count`` rows."""
        parts: list[torch.Tensor] = []
        missing = count
        while missing:
            block = self._rest if self._rest is not None else next(self._blocks)
            block = block if block.ndim else block.reshape(1)
            parts.append(block[:missing])
            self._rest = block[missing:] if len(block) > missing else None
            missing -= len(parts[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)
