"""bitsandbytes' NF4 (Dettmers et al. 2023, "QLoRA") as a stream: quantize, dequantize, and which
tensors transformers quantizes.

Every 64 numbers have their own scale, so that a few rows give the bits of the whole tensor. Only
the scales depend on each other, by the mean that double quantization takes from them: of a tensor,
4 bits a number are held at once, never the model.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtune.errors import ConfigError, ExportError
from llmtune.export.sources.tensor_source import TensorSource, find_name, read_whole, some
from llmtune.plan.memory.model_shape import build_meta_model
from llmtune.storage.row_blocks import row_ranges

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# : Numbers with a scale of their own, and scales with one of theirs: the defaults of bitsandbytes
# and transformers.
BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256

#: What bitsandbytes quantizes.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: Elements quantized at once; bitsandbytes takes 16 bytes for each on the way.
_PIECE_ELEMENTS = 1 << 20


class Nf4RoundTripSource:
    """Another source, with the named tensors quantized to NF4 and dequantized again: what a QLoRA
    training computes with.

    An adapter that is merged onto it sits on the very weights that it was trained on. The merge
    adds the fp32 product of the adapter to the dequantized weights and rounds the sum once, to the
    stored dtype. peft's own merge on a 4-bit model quantizes the sum to NF4 again, which adds a
    second quantization error; the two merged models are therefore not equal.

    Quantized is what the source stores: where a training loads an fp32 base in bf16, put a
    ``RetypedSource`` of it in here.
    """

    def __init__(
        self, source: TensorSource, names: Mapping[str, bool], double_quant: bool = True
    ) -> None:
        """Name what is quantized.

        Args:
            names: From :func:`quantized_names`: tensor -> whether its rows are inputs, not outputs.
            double_quant: Quantize the scales too, ``bnb_4bit_use_double_quant``.

        Raises:
            ExportError: A name is not the source's, or its dtype is none that bitsandbytes
                quantizes.
        """
        check_quantizable(source, names)
        self._source = source
        self._names = dict(names)
        self._double_quant = double_quant
        self.specs = dict(source.specs)

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Rows of the tensor, with their quantization error, in the stored dtype."""
        if name not in self._names:
            yield from self._source.blocks(name)
            return
        packed, state = quantize(self._source, name, self._names[name], self._double_quant)
        yield from dequantize(packed, state, self._names[name])


def quantized_names(model: Path | PretrainedConfig, source: TensorSource) -> dict[str, bool]:
    """The tensors that transformers stores as NF4 when it loads a model in 4 bits: linear layers
    but the output layer.

    The answer is transformers' own, on the skeleton that the configuration describes.

    Args:
        model: A model folder, or its configuration.

    Returns:
        Name in the source -> whether the layer stores (in, out), as GPT-2's Conv1D does; it is
        quantized transposed.

    Raises:
        ExportError: The model cannot be built, or a layer is not in the source under a name of its
            own.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    skeleton = _build_skeleton(model)
    kept = HfQuantizer.get_modules_to_not_convert(skeleton, None, skeleton._keep_in_fp32_modules)
    found: dict[str, bool] = {}
    missing = []
    for module_name, module in skeleton.named_modules():
        linear = type(module) is torch.nn.Linear or isinstance(module, Conv1D)
        if not linear or not should_convert_module(module_name, kept):
            continue
        name = find_name(f"{module_name}.weight", source.specs)
        if name is None:
            missing.append(f"{module_name}.weight")
        else:
            found[name] = isinstance(module, Conv1D)
    if missing:
        raise ExportError(
            f"{len(missing)} linear layers of the model are in no file under that name:"
            f" {some(missing)}; store the model with transformers' save_pretrained first"
        )
    return found


def check_quantizable(source: TensorSource, names: Mapping[str, bool]) -> None:
    """Whether bitsandbytes can quantize these tensors.

    Raises:
        ExportError: One is not there, or has another dtype.
    """
    strange = [name for name in names if name not in source.specs]
    if strange:
        raise ExportError(
            f"cannot be quantized to NF4, because they are not there: {some(strange)}"
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
    double_quant: bool = True,
    offset: float | None = None,
) -> tuple[torch.Tensor, Any]:
    """One tensor in NF4, with bitsandbytes' bits.

    Args:
        transposed: Quantize columns of the source as rows.
        offset: The mean of the scales, where it is known; the last digit of a mean depends on the
            number of threads.

    Returns:
        Two numbers a byte, shape (bytes, 1), and bitsandbytes' ``QuantState``.
    """
    functional = load_bitsandbytes()
    spec = source.specs[name]
    packed, scales, code = [], [], None
    for piece in _pieces(source, name, transposed):
        four_bits, state = functional.quantize_4bit(piece, blocksize=BLOCK_SIZE, quant_type="nf4")
        packed.append(four_bits)
        scales.append(state.absmax)
        code = state.code
    absmax, mean, state2 = torch.cat(scales), None, None
    if double_quant:
        mean = absmax.mean() if offset is None else torch.tensor(offset)
        absmax, state2 = functional.quantize_blockwise(absmax - mean, blocksize=NESTED_BLOCK_SIZE)
    whole = functional.QuantState(
        absmax=absmax,
        shape=torch.Size(spec.shape[::-1] if transposed else spec.shape),
        code=code,
        blocksize=BLOCK_SIZE,
        quant_type="nf4",
        dtype=spec.dtype,
        offset=mean,
        state2=state2,
    )
    return torch.cat(packed), whole


def mean_scale(source: TensorSource, name: str, transposed: bool) -> float:
    """The mean of a tensor's scales, as :func:`quantize` finds it, at a tenth of its cost."""
    scales = []
    for piece in _pieces(source, name, transposed):
        full = len(piece) // BLOCK_SIZE * BLOCK_SIZE
        scales.append(piece[:full].view(-1, BLOCK_SIZE).abs().amax(dim=1).float())
        if full < len(piece):
            scales.append(piece[full:].abs().amax().float().clamp(min=1e-38).reshape(1))
    return torch.cat(scales).mean().item()


def dequantize(packed: torch.Tensor, state: Any, transposed: bool) -> Iterator[torch.Tensor]:
    """The numbers that the 4 bits stand for, a few rows at a time, in the dtype that they were
    quantized from.

    Args:
        packed: Two numbers a byte; whatever dtype they are stored as.
        state: bitsandbytes' ``QuantState``.
        transposed: Give columns as rows; takes the whole tensor.
    """
    rows = _dequantized_rows(packed.reshape(-1).view(torch.uint8), state)
    if not transposed:
        yield from rows
        return
    whole = torch.cat(list(rows)).T
    for first, last in row_ranges(tuple(whole.shape)):
        yield whole[first:last]


def load_bitsandbytes() -> Any:
    """``bitsandbytes.functional``; on a CPU it says at import that kernels for inference are
    missing, which nobody needs here.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    finally:
        logger.setLevel(level)
    return functional


def _dequantized_rows(packed: torch.Tensor, state: Any) -> Iterator[torch.Tensor]:
    functional = load_bitsandbytes()
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    width = math.prod(state.shape[1:])
    # Rows that end where a block ends.
    unit = state.blocksize // math.gcd(width, state.blocksize)
    step = -(-next(row_ranges(tuple(state.shape)))[1] // unit) * unit
    for first in range(0, state.shape[0], step):
        last = min(first + step, state.shape[0])
        start, end = first * width, last * width
        # As one row of even length: for rows that no block ends with, bitsandbytes 0.50 takes wrong
        # scales on CPUs with AVX-512 (a GPU takes the right ones), and for odd lengths a path that
        # it compiles first.
        piece = functional.QuantState(
            absmax=absmax[start // state.blocksize : -(-end // state.blocksize)],
            shape=torch.Size((end - start + end % 2,)),
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
        )
        numbers = functional.dequantize_4bit(packed[start // 2 : -(-end // 2)], piece).reshape(-1)
        yield numbers[: end - start].reshape(last - first, *state.shape[1:])


def _pieces(source: TensorSource, name: str, transposed: bool) -> Iterator[torch.Tensor]:
    """The tensor's numbers in order, rounded to the stored dtype, in pieces of whole blocks but for
    the last one.
    """
    spec = source.specs[name]
    blocks = source.blocks(name) if not transposed else iter([read_whole(source, name).T])
    rest = torch.empty(0, dtype=spec.dtype)
    for block in blocks:
        flat = block.to(spec.dtype).reshape(-1)
        flat = torch.cat([rest, flat]) if len(rest) else flat
        full = len(flat) // BLOCK_SIZE * BLOCK_SIZE
        if full:
            yield from flat[:full].split(_PIECE_ELEMENTS)
        rest = flat[full:]
    if len(rest):
        yield rest


def _build_skeleton(model: Path | PretrainedConfig) -> Any:
    """The model without numbers, of the class that the configuration names."""
    import transformers

    try:
        config = (
            transformers.AutoConfig.from_pretrained(str(model), trust_remote_code=False)
            if isinstance(model, Path)
            else model
        )
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        if kind is None:
            return build_meta_model(config)[0]
        with torch.device("meta"):
            return kind(config)
    except (OSError, ValueError, TypeError, KeyError, ConfigError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(f"{model}: cannot tell which layers are linear: {reason}") from error
