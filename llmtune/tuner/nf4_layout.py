"""The bytes of a weight in NF4: where its 4-bit numbers and their scales are in one flat buffer.

The numbers and the scales of a weight are one parameter, so that ZeRO 3 partitions both, and
gathers them together. The values are those of bitsandbytes (``functional.quantize_4bit``): one
scale for each 64 numbers and, with double quantization, one byte for each scale, an fp32 scale for
each 256 of these bytes, and the mean that was subtracted from the scales before (Dettmers et al.
2023, "QLoRA", section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

#: Numbers per scale, and scales per nested scale: the defaults of bitsandbytes and transformers.
BLOCK_SIZE = 64
NESTED_BLOCK_SIZE = 256

#: Bytes of the 4-bit numbers of one block.
BLOCK_BYTES = BLOCK_SIZE // 2

FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Nf4Layout:
    """The buffer of one weight: its numbers, then fp32 scales, then scales in 8 bits."""

    numel: int
    """Elements of the weight."""
    double_quant: bool
    """The scales are quantized too, to 8 bits."""

    @property
    def code_bytes(self) -> int:
        """Return the bytes of the 4-bit numbers, two in each."""
        return -(-self.numel // 2)

    @property
    def blocks(self) -> int:
        """Return the number of scales."""
        return -(-self.numel // BLOCK_SIZE)

    @property
    def scales_start(self) -> int:
        """Return the byte where the fp32 scales begin, which is a multiple of their size."""
        return -(-self.code_bytes // FP32_BYTES) * FP32_BYTES

    @property
    def fp32_scales(self) -> int:
        """Return the number of scales in fp32: nested ones, or one for each block."""
        return -(-self.blocks // NESTED_BLOCK_SIZE) if self.double_quant else self.blocks

    @property
    def mean_start(self) -> int:
        """Return the byte behind the fp32 scales: that of the mean, with double quantization."""
        return self.scales_start + FP32_BYTES * self.fp32_scales

    @property
    def bytes_start(self) -> int:
        """Return the byte where the scales in 8 bits begin, with double quantization."""
        return self.mean_start + FP32_BYTES

    @property
    def nbytes(self) -> int:
        """Return the bytes of all of them."""
        return self.bytes_start + self.blocks if self.double_quant else self.mean_start

    def stored_numel(self, element_bytes: int) -> int:
        """Return the elements of the parameter that holds the buffer.

        Args:
            element_bytes: Bytes of an element of its dtype, which is the training's.
        """
        return -(-self.nbytes // element_bytes)
