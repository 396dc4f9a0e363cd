"""Compare the outputs of modules whose numbers cannot be recomputed, on the same inputs.

From an output one cannot tell a change that was lost in rounding from one that was never merged.
But the effect of rounding has a bound: each stored number may be off by half a unit in the last
place (ULP), so an output by the sum of those times the inputs. A smaller difference is never
refused.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from llmtune.errors import ExportError
from llmtune.export.sources.tensor_source import TensorSource
from llmtune.export.verify.unit import Unit
from llmtune.units import some

#: Runs the only base module of a unit on some inputs, with the weights of a source;
#: :meth:`llmtune.export.verify.streamed_model.StreamedModel.run_unit`.
RunUnit = Callable[[TensorSource, Unit, tuple[Any, ...]], torch.Tensor]

#: Error of summing fp32 products in another order, relative to the norm of the output.
_ARITHMETIC = 1e-5


def half_ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return half the distance to the next number of a dtype, in fp32."""
    limits = torch.finfo(dtype)
    # Numbers are mantissa * 2**exponent with a mantissa from 1/2 to 1.
    _, exponent = torch.frexp(values.to(dtype).float().abs().clamp(min=limits.tiny))
    return torch.ldexp(torch.full(exponent.shape, limits.eps / 4), exponent)


class HalfUlpSource:
    """Half an ULP of every number of another source: the bound of the error of one rounding."""

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self._source = source
        self._dtype = dtype
        self.specs = source.specs

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield powers of two in the stored dtype."""
        for block in self._source.blocks(name):
            yield half_ulp(block, self._dtype).to(self.specs[name].dtype)


class PerturbedSource:
    """Another source with every number moved by up to half an ULP, at random.

    It differs from the source as much as two roundings of one model do.
    """

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self._source = source
        self._half_ulps = HalfUlpSource(source, dtype)
        self.specs = {
            name: replace(spec, dtype=torch.float32) if spec.dtype.is_floating_point else spec
            for name, spec in source.specs.items()
        }

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield fp32 blocks, the same in each call."""
        if not self._source.specs[name].dtype.is_floating_point:
            yield from self._source.blocks(name)
            return
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        for block, half in zip(
            self._source.blocks(name), self._half_ulps.blocks(name), strict=True
        ):
            noise = 2 * torch.rand(block.shape, generator=generator) - 1
            yield block.float() + half.float() * noise


def perturb_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Move every number of a model in memory as :class:`PerturbedSource` does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 2 * torch.rand(parameter.shape, generator=generator) - 1
            parameter.add_(half_ulp(parameter, dtype) * noise)


class OutputComparison:
    """Runs wrapped modules also with the merged weights, while the reference runs."""

    def __init__(
        self,
        run_unit: RunUnit,
        merged: TensorSource,
        units: Sequence[Unit],
        dtype: torch.dtype,
    ) -> None:
        """Choose the modules.

        Args:
            run_unit: Runs a unit of the reference with other weights.
            units: Units of the reference that are compared.
            dtype: The dtype that the merged weights were rounded to.
        """
        self._run_unit = run_unit
        self._merged = merged
        self._half_ulps = HalfUlpSource(merged, dtype)
        self._outer = {id(unit.outer) for unit in units}
        self.units = [unit.name for unit in units]
        self._problems: list[str] = []
        self.errors: dict[str, float] = {}
        """Module -> relative difference of its outputs; NaN where only the logits show it."""

    def compare(self, unit: Unit, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
        """Compare one module's outputs; a :data:`UnitHook`."""
        if id(unit.outer) not in self._outer:
            return
        name = unit.inner[0][0]
        if len(unit.inner) != 1:
            # It has no own weights to replace; only the logits show a difference.
            self.errors[unit.name] = math.nan
            return
        merged_output = self._run_unit(self._merged, unit, arguments)
        self.errors[name] = relative_error(merged_output, output, centered=False)
        # The bound: half an ULP of every weight, times the absolute inputs.
        absolute = tuple(
            tensor.abs() if tensor.is_floating_point() else tensor for tensor in arguments
        )
        bound = self._run_unit(self._half_ulps, unit, absolute).abs()
        arithmetic = _ARITHMETIC * output.norm(dim=-1, keepdim=True)
        inside = (merged_output - output).abs() <= bound + arithmetic
        if not bool(inside.all()):
            self._problems.append(
                f"{name} (off by {self.errors[name]:.1e}, which no rounding explains)"
            )

    def check(self) -> None:
        """Refuse modules whose outputs differ by more than rounding explains.

        Raises:
            ExportError: Some of them are named.
        """
        if self._problems:
            raise ExportError(
                f"the merged model is not base and adapter: {len(self._problems)} of"
                f" {len(self.errors)} modules have other outputs: {some(self._problems)}; nothing"
                " was published"
            )


def relative_error(output: torch.Tensor, expected: torch.Tensor, centered: bool = True) -> float:
    """Return the largest ``||output - expected|| / ||expected||`` of a position.

    NaN counts as the largest.

    Args:
        centered: Subtract the mean of each position first: logits mean the same with any number
            added, unless there is only one.
    """
    if centered and expected.shape[-1] > 1:
        output = output - output.mean(-1, keepdim=True)
        expected = expected - expected.mean(-1, keepdim=True)
    norms = expected.norm(dim=-1)
    # A position whose output is nearly zero has no meaningful relative error.
    ratio = (output - expected).norm(dim=-1) / norms.clamp(min=float(norms.max()) * 1e-3)
    return float(ratio.max()) if bool(torch.isfinite(ratio).all()) else math.nan
