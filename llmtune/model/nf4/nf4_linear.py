"""A linear layer whose weight is kept in NF4, and which ZeRO partitions like any other.

bitsandbytes' own ``Linear4bit`` keeps the scales beside its parameter, whole on every rank, and
its product holds the gathered bytes of every layer until the backward pass. Here scales are a part
of the parameter (:mod:`llmtune.tuner.nf4_layout`), and the backward pass reads the parameter again,
which ZeRO 3 has gathered a second time by then. The arithmetic is that of bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from llmtune.model.nf4.nf4_slices import load_bitsandbytes
from llmtune.model.weights.zero3_loading import Read, ReadAgain, load_slice, read_flat
from llmtune.tuner.nf4_layout import BLOCK_SIZE, NESTED_BLOCK_SIZE, Nf4Layout


@dataclass(frozen=True, slots=True)
class Nf4Matrix:
    """The shape of a weight, and the layout of the buffer that holds it."""

    shape: tuple[int, int]
    """(outputs, inputs)."""
    layout: Nf4Layout

    def unpack(self, stored: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, Any]:
        """Return the 4-bit numbers and bitsandbytes' ``QuantState``; both are views of ``stored``.

        Args:
            stored: The parameter, whole.
            shape: That of the weight, or of its flattened elements.
        """
        layout, dtype = self.layout, stored.dtype
        buffer = stored.detach().view(torch.uint8)
        fp32 = buffer[layout.scales_start : layout.mean_start].view(torch.float32)
        quant_state = load_bitsandbytes().QuantState
        described = {
            "shape": torch.Size(shape),
            "blocksize": BLOCK_SIZE,
            "quant_type": "nf4",
            "dtype": dtype,
        }
        codes = buffer[: layout.code_bytes].view(-1, 1)
        if not layout.double_quant:
            return codes, quant_state(absmax=fp32, **described)
        mean = buffer[layout.mean_start : layout.bytes_start].view(torch.float32)
        nested = quant_state(
            absmax=fp32,
            code=_map_of_8_bits(stored.device),
            blocksize=NESTED_BLOCK_SIZE,
            dtype=torch.float32,
        )
        in_8_bits = buffer[layout.bytes_start : layout.nbytes]
        state = quant_state(absmax=in_8_bits, offset=mean[0], state2=nested, **described)
        return codes, state

    def dequantize(self, stored: torch.Tensor) -> torch.Tensor:
        """Return the weight in the dtype that it was quantized from. Shape (outputs, inputs)."""
        # Of a row that no block ends with, bitsandbytes 0.50 takes wrong scales on CPUs with
        # AVX-512; and flat tensors of an odd length take a path that it compiles first.
        numel = self.layout.numel
        codes, state = self.unpack(stored, (numel + numel % 2,))
        values: torch.Tensor = load_bitsandbytes().dequantize_4bit(codes, state)
        return values.reshape(-1)[:numel].view(self.shape)

    def multiply(
        self, values: torch.Tensor, stored: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Multiply by the transposed weight, and add the bias, as a linear layer does."""
        if values.device.type == "cpu" and self.shape[1] % BLOCK_SIZE:
            weight = self.dequantize(stored).to(values.dtype)
            return nn.functional.linear(values, weight, bias)
        from bitsandbytes import matmul_4bit

        codes, state = self.unpack(stored, self.shape)
        product = matmul_4bit(values, codes, state, bias=bias)
        assert isinstance(product, torch.Tensor)
        return product


@cache
def _map_of_8_bits(device: torch.device) -> torch.Tensor:
    """Return the values of the 8-bit scales, as ``quantize_blockwise`` has them. Shape (256,)."""
    code: torch.Tensor = load_bitsandbytes().create_dynamic_map()
    return code.to(device)


class _Product(torch.autograd.Function):
    """The product of a linear layer, whose weight is dequantized in both passes."""

    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        stored: torch.Tensor,
        bias: torch.Tensor | None,
        matrix: Nf4Matrix,
    ) -> torch.Tensor:
        # The parameter itself is saved, not what it holds now: ZeRO 3 takes that away, and gathers
        # it again before the backward pass.
        ctx.save_for_backward(stored)
        ctx.matrix = matrix
        return matrix.multiply(values, stored, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        of_values = of_bias = None
        if ctx.needs_input_grad[0]:
            (stored,) = ctx.saved_tensors
            of_values = gradient @ ctx.matrix.dequantize(stored).to(gradient.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0)
        return of_values, None, of_bias, None


@dataclass(frozen=True, slots=True)
class Nf4Origin:
    """The source of a layer in NF4: the unquantized weight, and how it is packed."""

    read_weight: ReadAgain
    """Reads the unquantized weight from the model's files. Shape (outputs, inputs), on the host."""
    pack: Callable[[Read], Read]
    """Turns a function that reads a weight into one that reads it as the parameter holds it.

    The latter is called on every rank.
    """


class Nf4Linear(nn.Linear):
    """A linear layer with its weight in NF4, which is frozen."""

    origin: Nf4Origin

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        *,
        double_quant: bool,
        transposed: bool,
        dtype: torch.dtype,
    ):
        """Make the parameters, without values.

        Args:
            transposed: The files hold the weight as (inputs, outputs), as GPT-2's do.
            dtype: The training's. The buffer of the weight has it too, so that ZeRO 3 gathers it
                together with other weights; transformers calls that ``bnb_4bit_quant_storage``.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.is_stored_transposed = transposed
        layout = Nf4Layout(in_features * out_features, double_quant)
        self.matrix = Nf4Matrix((out_features, in_features), layout)
        stored = torch.empty(layout.stored_numel(dtype.itemsize), dtype=dtype)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None
        )

    @property
    def W_q(self) -> torch.Tensor:  # noqa: N802
        """Return the packed weight.

        By this name peft knows a layer whose weight it gets from :meth:`dequantize`
        (``dequantize_module_weight`` of ``peft/utils/integrations.py``).
        """
        return self.weight

    def dequantize(self) -> torch.Tensor:
        """Return the weight that the layer multiplies by. Shape (outputs, inputs)."""
        return self.matrix.dequantize(self.weight)

    def quantize(self, weight: torch.Tensor, rank: int) -> None:
        """Hold another weight in NF4: this rank's slice of it, or all without ZeRO 3. Collective.

        Args:
            weight: Shape (outputs, inputs), whole on every rank, on the host.
            rank: This rank's number.
        """
        read = self.origin.pack(partial(read_flat, weight.reshape(-1)))
        with torch.no_grad():
            load_slice(self.weight, read, rank)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Return the shape of the weight in the model's files."""
        outputs, inputs = self.matrix.shape
        return (inputs, outputs) if self.is_stored_transposed else (outputs, inputs)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Multiply by the dequantized weight. Shape (..., inputs) -> (..., outputs)."""
        product: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            values, self.weight, self.bias, self.matrix
        )
        return product
