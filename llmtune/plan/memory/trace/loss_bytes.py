"""Bytes of a model's outputs and of their loss, and of products on a CPU."""

from __future__ import annotations

from llmtune.config.schema import Precision
from llmtune.plan.memory.rank_bytes import element_bytes
from llmtune.plan.memory.shapes import ModelShape
from llmtune.task.language_head.chunks import ChunkSizes

_FP32 = 4


def loss_bytes(judged: int, outputs: int, precision: Precision) -> int:
    """Return the peak bytes of logits and loss.

    These are the logits in the training dtype, and in fp32 the log-probabilities and two gradients
    of them. Follows ``task/losses.py``: cross entropy over all positions in fp32, and its backward
    pass.

    Args:
        judged: Tokens or rows that have logits.
        outputs: Logits of each.
    """
    return judged * outputs * (element_bytes(precision) + 3 * _FP32)


def head_loss_bytes(
    judged: int, shape: ModelShape, precision: Precision, accelerator: str, trains: bool = True
) -> int:
    """Return the peak bytes of a loss that is computed in the output projection.

    Follows ``task/language_head/chunked_loss.py``. The body's output and its gradient are counted
    here, since a trace leaves them to the loss.

    Args:
        judged: Tokens of a micro-batch, of which all may be trained.
        accelerator: ``cuda`` or ``cpu``.
        trains: There is a backward pass.
    """
    size, sizes = element_bytes(precision), ChunkSizes()
    words, width = shape.outputs, shape.head_parameters // shape.outputs
    converts = _converts(accelerator, precision)
    # The body's output, the judged positions of it, and the logits of a chunk: in 16 bits and in
    # fp32, or as gradient in fp32 and in 16 bits.
    states = 2 * size * judged * width
    if converts:
        states += _FP32 * width * (judged + words)
    in_16_bits = 0 if size == _FP32 or converts else size
    rows = min(judged, sizes.chunk_size(words, accelerator))
    chunk = rows * words * (_FP32 + in_16_bits)
    if not trains:
        return states + chunk

    # The gradients of the judged positions in fp32, and of a trained projection: of some words at a
    # time behind the chunks, or added up in fp32 beside them and rounded.
    states += _FP32 * judged * width
    kept = _FP32 if precision is Precision.fp16 else size
    of_weight = kept * words * width if shape.trains_head else 0
    if of_weight and not sizes.sums_over_positions(words * width):
        block = min(words, sizes.chunk_size(max(judged, width), accelerator))
        product = _FP32 * (judged + (block if kept == _FP32 or converts else 0)) * width
        behind = of_weight + block * judged * (_FP32 + in_16_bits) + product
        return states + max(chunk, behind)
    if of_weight and kept < _FP32 and (rows < judged or converts):
        of_weight += _FP32 * words * width
    return states + of_weight + chunk


def converted_bytes(tokens: int, shape: ModelShape, precision: Precision, accelerator: str) -> int:
    """Return the bytes of the fp32 copies of the largest product of a layer; 0 without copies.

    See :mod:`llmtune.cpu_products`.

    Args:
        tokens: Of a micro-batch.
        accelerator: ``cuda`` or ``cpu``.
    """
    if not _converts(accelerator, precision):
        return 0
    inputs, outputs = shape.hidden_size, shape.intermediate_size
    return _FP32 * (inputs * outputs + tokens * (inputs + outputs))


def _converts(accelerator: str, precision: Precision) -> bool:
    """Tell whether products are made of copies in fp32, as far as a plan knows: on every CPU."""
    return accelerator == "cpu" and precision is not Precision.fp32
