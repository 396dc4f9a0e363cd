"""Quantize to bitsandbytes' NF4 and back as a stream (Dettmers et al. 2023, "QLoRA").

Every 64 numbers have their own scale, so that a few rows can be quantized without the rest. Only
the scales depend on each other, through the mean that double quantization subtracts from them. In
memory is one tensor in 4 bits per number, never the model.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from llmtune.errors import ConfigError, ExportError, first_line
from llmtune.export.sources.tensor_source import (
    RetypedSource,
    TensorSource,
    find_name,
    read_whole,
)
from llmtune.model.nf4.nf4_slices import CHUNK_ELEMENTS, load_bitsandbytes
from llmtune.plan.architecture.meta_model import build_meta_model
from llmtune.storage.tensors.row_blocks import row_ranges
from llmtune.tuner.nf4_layout import BLOCK_SIZE, NESTED_BLOCK_SIZE
from llmtune.tuner.quantized_layers import find_quantized_layers
from llmtune.units import some

#: Dtypes that bitsandbytes quantizes.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Nf4RoundTripSource:
    """Another source with some tensors quantized to NF4 and dequantized, as QLoRA trains on them.

    An adapter that is merged onto it is on the very weights that it was trained on. The merge adds
    the fp32 product of the adapter to the dequantized weights and rounds the sum once, to the
    stored dtype. peft's own merge on a 4-bit model quantizes the sum to NF4 again, which adds a
    second quantization error; the two merged models are therefore not equal.

    A training in bf16 rounds an fp32 base before it quantizes: numbers near the border of two
    codes then have the other one.
    """

    def __init__(
        self,
        source: TensorSource,
        names: Mapping[str, bool],
        double_quant: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Choose the tensors.

        Args:
            names: From :func:`quantized_names`: tensor -> whether its rows are inputs, not outputs.
            double_quant: The scales were quantized too.
            dtype: The dtype from which the training quantized; by default the stored one.

        Raises:
            ExportError: The source has no such tensor, or bitsandbytes does not quantize its dtype.
        """
        check_quantizable(source, names)
        self._source = source
        self._quantized = source if dtype is None else RetypedSource(source, dtype)
        self._names = dict(names)
        self._double_quant = double_quant
        self.specs = dict(source.specs)

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield rows with their quantization error, in the stored dtype."""
        if name not in self._names:
            yield from self._source.blocks(name)
            return
        packed, state = quantize(
            self._quantized, name, self._names[name], double_quant=self._double_quant
        )
        for rows in dequantize(packed, state, self._names[name]):
            yield rows.to(self.specs[name].dtype)


def quantized_names(folder: Path, source: TensorSource) -> dict[str, bool]:
    """Find the tensors that transformers quantizes when it loads a model in 4 bits.

    They are chosen on the skeleton that the configuration describes, as for a training in 4 bits.

    Args:
        folder: The model folder, of which ``config.json`` is read.

    Returns:
        Name in the source -> whether the layer stores (in, out), as GPT-2's Conv1D does; it is
        quantized transposed.

    Raises:
        ExportError: The model cannot be built, or a layer has no tensor in the source under its
            name.
    """
    transposed: dict[str, bool] = {}
    missing = []
    for module_name, module in find_quantized_layers(_build_skeleton(folder)).items():
        name = find_name(f"{module_name}.weight", source.specs)
        if name is None:
            missing.append(f"{module_name}.weight")
        else:
            transposed[name] = not isinstance(module, torch.nn.Linear)
    if missing:
        raise ExportError(
            f"{len(missing)} linear layers of the model are in no file under that name:"
            f" {some(missing)}; store the model with transformers' save_pretrained first"
        )
    return transposed


def check_quantizable(source: TensorSource, names: Mapping[str, bool]) -> None:
    """Check that bitsandbytes can quantize these tensors.

    Raises:
        ExportError: One is missing, or has another dtype.
    """
    missing = [name for name in names if name not in source.specs]
    if missing:
        raise ExportError(
            f"cannot be quantized to NF4, because they are not there: {some(missing)}"
        )
    wrong = [
        f"{name} ({source.specs[name].dtype})"
        for name in names
        if source.specs[name].dtype not in DTYPES
    ]
    if wrong:
        raise ExportError(
            f"NF4 is made of bf16, fp16 or fp32, not of {some(wrong)}; set export.dtype=bf16"
        )


def quantize(
    source: TensorSource,
    name: str,
    transposed: bool,
    offset: float | None = None,
    double_quant: bool = True,
) -> tuple[torch.Tensor, Any]:
    """Quantize one tensor to the same bits as bitsandbytes does.

    Args:
        transposed: Quantize columns of the source as rows.
        offset: The mean of the scales, where it is known; the last digit of a mean depends on the
            number of threads.
        double_quant: Quantize the scales too.

    Returns:
        Two numbers per byte, shape (bytes, 1), and bitsandbytes' ``QuantState``.
    """
    functional = load_bitsandbytes()
    spec = source.specs[name]
    packed, scales, code = [], [], None
    for chunk in _chunks(source, name, transposed):
        four_bits, state = functional.quantize_4bit(chunk, blocksize=BLOCK_SIZE, quant_type="nf4")
        packed.append(four_bits)
        scales.append(state.absmax)
        code = state.code
    absmax = torch.cat(scales)
    described = {
        "shape": torch.Size(spec.shape[::-1] if transposed else spec.shape),
        "code": code,
        "blocksize": BLOCK_SIZE,
        "quant_type": "nf4",
        "dtype": spec.dtype,
    }
    if not double_quant:
        return torch.cat(packed), functional.QuantState(absmax=absmax, **described)
    mean = absmax.mean() if offset is None else torch.tensor(offset)
    absmax, state2 = functional.quantize_blockwise(absmax - mean, blocksize=NESTED_BLOCK_SIZE)
    state = functional.QuantState(absmax=absmax, offset=mean, state2=state2, **described)
    return torch.cat(packed), state


def mean_scale(source: TensorSource, name: str, transposed: bool) -> float:
    """Compute the mean of a tensor's scales as :func:`quantize` does, at a tenth of its cost."""
    scales = []
    for chunk in _chunks(source, name, transposed):
        full = len(chunk) // BLOCK_SIZE * BLOCK_SIZE
        scales.append(chunk[:full].view(-1, BLOCK_SIZE).abs().amax(dim=1).float())
        if full < len(chunk):
            scales.append(chunk[full:].abs().amax().float().clamp(min=1e-38).reshape(1))
    return torch.cat(scales).mean().item()


def dequantize(packed: torch.Tensor, state: Any, transposed: bool) -> Iterator[torch.Tensor]:
    """Dequantize a few rows at a time, to the dtype that they were quantized from.

    Args:
        packed: Two numbers per byte, stored in any dtype.
        state: bitsandbytes' ``QuantState``.
        transposed: Yield columns as rows; the whole tensor is then in memory.
    """
    rows = _dequantized_rows(packed.reshape(-1).view(torch.uint8), state)
    if not transposed:
        yield from rows
        return
    tensor = torch.cat(list(rows)).T
    for first, last in row_ranges(tuple(tensor.shape)):
        yield tensor[first:last]


def _dequantized_rows(packed: torch.Tensor, state: Any) -> Iterator[torch.Tensor]:
    functional = load_bitsandbytes()
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    width = math.prod(state.shape[1:])
    # Take as many rows at once as end together with a block.
    rows_per_block = state.blocksize // math.gcd(width, state.blocksize)
    step = -(-next(row_ranges(tuple(state.shape)))[1] // rows_per_block) * rows_per_block
    for first in range(0, state.shape[0], step):
        last = min(first + step, state.shape[0])
        start, end = first * width, last * width
        # Pass one row of even length: for rows that no block ends with, bitsandbytes 0.50 takes
        # wrong scales on CPUs with AVX-512 (a GPU takes the right ones), and for odd lengths a path
        # that it compiles first.
        chunk_state = functional.QuantState(
            absmax=absmax[start // state.blocksize : -(-end // state.blocksize)],
            shape=torch.Size((end - start + end % 2,)),
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        values = functional.dequantize_4bit(packed[start // 2 : -(-end // 2)], chunk_state)
        yield values.reshape(-1)[: end - start].reshape(last - first, *state.shape[1:])


def _chunks(source: TensorSource, name: str, transposed: bool) -> Iterator[torch.Tensor]:
    """Yield a tensor's numbers in order, rounded to the stored dtype.

    Chunks are flat and consist of whole quantization blocks, but for the last one.
    """
    spec = source.specs[name]
    blocks = source.blocks(name) if not transposed else iter([read_whole(source, name).T])
    rest = torch.empty(0, dtype=spec.dtype)
    for block in blocks:
        flat = block.to(spec.dtype).reshape(-1)
        flat = torch.cat([rest, flat]) if len(rest) else flat
        full = len(flat) // BLOCK_SIZE * BLOCK_SIZE
        if full:
            yield from flat[:full].split(CHUNK_ELEMENTS)
        rest = flat[full:]
    if len(rest):
        yield rest


def _build_skeleton(folder: Path) -> Any:
    """Build the model without weights, of the class that the configuration names."""
    import transformers

    try:
        config: Any = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        model_class = getattr(transformers, (config.architectures or [""])[0], None)
        if model_class is None:
            return build_meta_model(config)[0]
        with torch.device("meta"):
            return model_class(config)
    except (OSError, ValueError, TypeError, KeyError, ConfigError) as error:
        raise ExportError(
            f"{folder}: cannot tell which layers are linear: {first_line(error)}"
        ) from error
