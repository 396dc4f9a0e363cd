"""Formats of an optimizer's numbers; :mod:`llmtune.optimizer.block_codes` has the 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

#: Elements that share a scale where numbers are stored in 8 bits. They are those of one parameter,
#: counted from its first element, so that ranks and stages cut no other blocks.
BLOCK_ELEMENTS = 256

#: What follows the name of a state that is stored in blocks, in the name of its scales in files.
SCALES = ".scales"


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """A format of the numbers of one tensor."""

    name: str
    """Its name for people, and in the header of a checkpoint's file."""
    element_bytes: float
    """Bytes per element, scales included."""
    in_blocks: bool = False
    """Codes of 8 bits, with an fp32 scale for each block of :data:`BLOCK_ELEMENTS`."""
    signed: bool = True
    """Numbers may be negative."""


FP32 = Storage(name="fp32", element_bytes=4)
BF16 = Storage(name="bf16", element_bytes=2)
SIGNED_8BIT = Storage(
    name="signed 8-bit blocks", element_bytes=1 + 4 / BLOCK_ELEMENTS, in_blocks=True
)
UNSIGNED_8BIT = Storage(
    name="unsigned 8-bit blocks", element_bytes=1 + 4 / BLOCK_ELEMENTS, in_blocks=True, signed=False
)

#: All formats, by name.
STORAGES = {storage.name: storage for storage in (FP32, BF16, SIGNED_8BIT, UNSIGNED_8BIT)}
