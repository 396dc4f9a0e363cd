"""The sizes of the pieces in which the loss of an output projection is computed.

Without torch: a plan asks for them, too.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Logits of a chunk. A GPU is only busy with some hundreds of positions, or words, at a time.
CHUNK_LOGITS = {"cuda": 2**26, "cpu": 2**24}
#: Most bytes of a projection's gradient in fp32 that is added up over positions.
SUMMED_BYTES = 2**28


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSizes:
    """The sizes of chunks, and the largest gradient that is added up over them."""

    chunk_logits: int | None = None
    """Logits of a chunk; None goes by the device."""
    summed_bytes: int = SUMMED_BYTES
    """Most bytes of a projection's gradient in fp32 that is added up over positions."""

    def chunk_size(self, other: int, device: str) -> int:
        """Return the positions of a chunk of all words, or the words of one of all positions.

        Args:
            other: All words; or all positions, or the hidden size where that is larger.
            device: Type of the device.
        """
        logits = self.chunk_logits or CHUNK_LOGITS["cuda" if device == "cuda" else "cpu"]
        return max(1, logits // max(1, other))

    def sums_over_positions(self, weights: int) -> bool:
        """Tell whether the gradient of a projection of so many weights is added up."""
        return 4 * weights <= self.summed_bytes
