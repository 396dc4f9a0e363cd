"""Whether modules whose numbers cannot be recomputed answer as base and adapter do, on the same
input.

An answer cannot tell a change that rounding took from one that was never made. What can be told is
what rounding is able to do: each stored number may be off by half a unit in its last place, so an
output by half the sum of those times the inputs. Less than that is never refused.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from llmtune.errors import ExportError
from llmtune.export.sources.base import TensorSource, some
from llmtune.export.verify.streamed_model import StreamedModel, Unit

#: Two orders of summing the same fp32 products, relative to the length of an answer.
_ARITHMETIC = 1e-5


def half_unit(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance to the next number of a dtype, in fp32."""
    kind = torch.finfo(dtype)
    # Numbers are mantissa * 2**exponent with a mantissa from 1/2 to 1.
    _, exponent = torch.frexp(numbers.to(dtype).float().abs().clamp(min=kind.tiny))
    return torch.ldexp(torch.full(exponent.shape, kind.eps / 4), exponent)


class HalfUnits:
    """Another source's distances to the next numbers of the stored dtype, halved: the most that one
    rounding is off by.
    """

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self._source = source
        self._dtype = dtype
        self.specs = source.specs

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """In the stored dtype, of which they are powers of two."""
        for block in self._source.blocks(name):
            yield half_unit(block, self._dtype).to(self.specs[name].dtype)


class Shaken:
    """Another source with every number moved by up to half a unit, at random: as different as two
    roundings of one model are.
    """

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self._source = source
        self._half_units = HalfUnits(source, dtype)
        self.specs = {
            name: replace(spec, dtype=torch.float32) if spec.dtype.is_floating_point else spec
            for name, spec in source.specs.items()
        }

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """In fp32, the same each time."""
        if not self._source.specs[name].dtype.is_floating_point:
            yield from self._source.blocks(name)
            return
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        for block, half in zip(
            self._source.blocks(name), self._half_units.blocks(name), strict=True
        ):
            yield block.float() + half.float() * (2 * torch.rand(block.shape, generator=draw) - 1)


def shake_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """The same of a model in memory."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                half_unit(parameter, dtype) * (2 * torch.rand(parameter.shape, generator=draw) - 1)
            )


class Answers:
    """Asks wrapped modules what they would answer with merged weights, while the reference runs."""

    def __init__(
        self,
        reference: StreamedModel,
        merged: TensorSource,
        units: Sequence[Unit],
        dtype: torch.dtype,
    ) -> None:
        """Take what is asked.

        Args:
            units: Of the reference; others are passed over.
            dtype: What the merged weights were rounded to.
        """
        self._reference = reference
        self._merged = merged
        self._half_units = HalfUnits(merged, dtype)
        self._outer = {id(unit.outer) for unit in units}
        self.units = [unit.name for unit in units]
        self._problems: list[str] = []
        self.errors: dict[str, float] = {}

    def look(self, unit: Unit, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
        """Compare one module's answers."""
        if id(unit.outer) not in self._outer:
            return
        name = unit.inner[0][0]
        if len(unit.inner) != 1:
            # It has no weights of its own that could be changed for the merged ones; the logits
            # tell.
            self.errors[unit.name] = math.nan
            return
        found = self._reference.with_weights_of(self._merged, unit, arguments)
        self.errors[name] = relative_error(found, output, centered=False)
        sizes = tuple(given.abs() if given.is_floating_point() else given for given in arguments)
        bound = self._reference.with_weights_of(self._half_units, unit, sizes).abs()
        arithmetic = _ARITHMETIC * output.norm(dim=-1, keepdim=True)
        inside = (found - output).abs() <= bound + arithmetic
        if not bool(inside.all()):
            self._problems.append(
                f"{name} (off by {self.errors[name]:.1e}, which no rounding explains)"
            )

    def check(self) -> None:
        """Refuse.

        Raises:
            ExportError: Modules answer otherwise by more than rounding can do; some are named.
        """
        if self._problems:
            raise ExportError(
                f"the merged model is not base and adapter: {len(self._problems)} of"
                f" {len(self.errors)} modules answer otherwise: {some(self._problems)}; nothing was"
                " published"
            )


def relative_error(found: torch.Tensor, expected: torch.Tensor, centered: bool = True) -> float:
    """Largest over positions of the length of the difference by the length of what is expected; NaN
    is the largest.

    Args:
        centered: Take the mean off first; logits mean the same with any number added, unless there
            is only one.
    """
    if centered and expected.shape[-1] > 1:
        found, expected = (
            found - found.mean(-1, keepdim=True),
            expected - expected.mean(-1, keepdim=True),
        )
    lengths = expected.norm(dim=-1)
    # A position whose answer is nearly nothing has no relative error to speak of.
    ratio = (found - expected).norm(dim=-1) / lengths.clamp(min=float(lengths.max()) * 1e-3)
    return float(ratio.max()) if bool(torch.isfinite(ratio).all()) else math.nan
