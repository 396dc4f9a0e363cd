"""Speeds of accelerators by name: data sheets, and the shares of them that training reaches in published runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Card:
    """One accelerator."""

    flops: float
    """Dense bf16 with fp32 accumulation, operations a second."""
    efficiency: float
    """Share of ``flops`` that a training step reaches, recomputation counted (HFU)."""
    link_bandwidth: float
    """To its neighbours, one direction, as a collective reaches it: NVLink, or PCIe without it."""
    pcie_bandwidth: float
    """To the host, one direction, with all accelerators of a common board at once."""


GIB = 2**30

#: Efficiencies are those of DeepSpeed and FSDP runs of 70B models with eager kernels (docs/planner.md has the runs); a
#: data sheet's NVLink figure counts both directions, and collectives reach about 80 % of one.
CARDS: dict[str, Card] = {
    "A100-80GB": Card(312e12, 0.57, 240e9, 20e9),
    "A100-40GB": Card(312e12, 0.57, 240e9, 20e9),
    "H100": Card(989e12, 0.33, 360e9, 40e9),
    "H200": Card(989e12, 0.33, 360e9, 40e9),
    "A10": Card(125e12, 0.45, 10e9, 10e9),
    "L4": Card(121e12, 0.40, 10e9, 10e9),
    "L40S": Card(362e12, 0.40, 20e9, 20e9),
    "RTX 4090": Card(165e12, 0.55, 20e9, 20e9),
    "RTX 3090": Card(71e12, 0.53, 10e9, 10e9),
    "V100": Card(112e12, 0.40, 100e9, 10e9),
}

#: What is assumed of a card that is not in the table.
UNKNOWN = Card(60e12, 0.40, 10e9, 10e9)


def find_card(name: str | None, memory_bytes: int | None = None) -> Card | None:
    """The card whose name ``name`` begins with, maker aside (``NVIDIA A100-SXM4-80GB``); A100s are told apart by memory."""
    if not name:
        return None
    plain = name.upper().replace("NVIDIA", "").replace("GEFORCE", "").strip()
    if plain.startswith("A100"):
        small = "40GB" in plain or (memory_bytes is not None and memory_bytes < 50 * GIB)
        return CARDS["A100-40GB" if small else "A100-80GB"]
    known = sorted(CARDS, key=len, reverse=True)
    return next((CARDS[card] for card in known if plain.startswith(card.upper())), None)
