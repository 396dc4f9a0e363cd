"""Speeds of accelerators by name, from data sheets, and the shares that published runs reach."""

import re
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """An accelerator's speeds."""

    flops: float
    """Dense bf16 with fp32 accumulation, operations per second."""
    efficiency: float
    """Share of ``flops`` that a training step reaches, recomputation counted (HFU)."""
    link_bandwidth: float
    """Rate to its neighbors, in one direction, as collectives reach it: NVLink, or else PCIe."""
    pcie_bandwidth: float
    """Rate to the host, in one direction, with all accelerators of a common board at once."""
    fp32_flops: float
    """Plain fp32: torch uses TF32 only where it is told to."""
    compute_capability: int
    """Ten times the major version plus the minor one."""


GIB = 2**30

#: Efficiencies are those of DeepSpeed and FSDP runs of 70B models with eager kernels
#: (docs/planner.md has the runs); a data sheet's NVLink figure counts both directions, and
#: collectives reach about 80 % of one.
CARDS: dict[str, Card] = {
    "A100-80GB": Card(
        flops=312e12,
        efficiency=0.57,
        link_bandwidth=240e9,
        pcie_bandwidth=20e9,
        fp32_flops=19.5e12,
        compute_capability=80,
    ),
    "A100-40GB": Card(
        flops=312e12,
        efficiency=0.57,
        link_bandwidth=240e9,
        pcie_bandwidth=20e9,
        fp32_flops=19.5e12,
        compute_capability=80,
    ),
    "H100": Card(
        flops=989e12,
        efficiency=0.33,
        link_bandwidth=360e9,
        pcie_bandwidth=40e9,
        fp32_flops=67e12,
        compute_capability=90,
    ),
    "H100 NVL": Card(
        flops=835e12,
        efficiency=0.33,
        link_bandwidth=240e9,
        pcie_bandwidth=40e9,
        fp32_flops=60e12,
        compute_capability=90,
    ),
    "H100 PCIE": Card(
        flops=756e12,
        efficiency=0.33,
        link_bandwidth=40e9,
        pcie_bandwidth=40e9,
        fp32_flops=51e12,
        compute_capability=90,
    ),
    "H200": Card(
        flops=989e12,
        efficiency=0.33,
        link_bandwidth=360e9,
        pcie_bandwidth=40e9,
        fp32_flops=67e12,
        compute_capability=90,
    ),
    "H20": Card(
        flops=148e12,
        efficiency=0.57,
        link_bandwidth=360e9,
        pcie_bandwidth=40e9,
        fp32_flops=44e12,
        compute_capability=90,
    ),
    "GH200": Card(
        flops=989e12,
        efficiency=0.33,
        link_bandwidth=360e9,
        pcie_bandwidth=40e9,
        fp32_flops=67e12,
        compute_capability=90,
    ),
    "B200": Card(
        flops=2250e12,
        efficiency=0.33,
        link_bandwidth=720e9,
        pcie_bandwidth=40e9,
        fp32_flops=80e12,
        compute_capability=100,
    ),
    "A30": Card(
        flops=165e12,
        efficiency=0.57,
        link_bandwidth=80e9,
        pcie_bandwidth=20e9,
        fp32_flops=10.3e12,
        compute_capability=80,
    ),
    "A10": Card(
        flops=125e12,
        efficiency=0.45,
        link_bandwidth=10e9,
        pcie_bandwidth=10e9,
        fp32_flops=31.2e12,
        compute_capability=86,
    ),
    "L4": Card(
        flops=121e12,
        efficiency=0.40,
        link_bandwidth=10e9,
        pcie_bandwidth=10e9,
        fp32_flops=30.3e12,
        compute_capability=89,
    ),
    "L40": Card(
        flops=181e12,
        efficiency=0.40,
        link_bandwidth=20e9,
        pcie_bandwidth=20e9,
        fp32_flops=90.5e12,
        compute_capability=89,
    ),
    "L40S": Card(
        flops=362e12,
        efficiency=0.40,
        link_bandwidth=20e9,
        pcie_bandwidth=20e9,
        fp32_flops=91.6e12,
        compute_capability=89,
    ),
    "RTX A6000": Card(
        flops=155e12,
        efficiency=0.45,
        link_bandwidth=20e9,
        pcie_bandwidth=20e9,
        fp32_flops=38.7e12,
        compute_capability=86,
    ),
    "RTX 4090": Card(
        flops=165e12,
        efficiency=0.55,
        link_bandwidth=20e9,
        pcie_bandwidth=20e9,
        fp32_flops=82.6e12,
        compute_capability=89,
    ),
    "RTX 3090": Card(
        flops=71e12,
        efficiency=0.53,
        link_bandwidth=10e9,
        pcie_bandwidth=10e9,
        fp32_flops=35.6e12,
        compute_capability=86,
    ),
    # Their rates are those of fp16; they have no bf16.
    "V100": Card(
        flops=112e12,
        efficiency=0.40,
        link_bandwidth=100e9,
        pcie_bandwidth=10e9,
        fp32_flops=15.7e12,
        compute_capability=70,
    ),
    "T4": Card(
        flops=65e12,
        efficiency=0.40,
        link_bandwidth=10e9,
        pcie_bandwidth=10e9,
        fp32_flops=8.1e12,
        compute_capability=75,
    ),
}

#: What is assumed of a card that is not in the table.
UNKNOWN = Card(
    flops=60e12,
    efficiency=0.40,
    link_bandwidth=10e9,
    pcie_bandwidth=10e9,
    fp32_flops=15e12,
    compute_capability=0,
)

#: A slice of a card that is divided (MIG): ``A100-SXM4-80GB MIG 2g.20gb`` has two of seven.
_SLICE = re.compile(r"\bMIG (\d)G\.")
_SLICES = {"A30": 4}


def find_card(name: str | None, memory_bytes: int | None = None) -> Card | None:
    """Find the card whose name ``name`` begins with, maker aside (``NVIDIA A100-SXM4-80GB``).

    A100s are told apart by memory.
    """
    if not name:
        return None
    plain = name.upper().replace("NVIDIA", "").replace("TESLA", "").replace("GEFORCE", "").strip()
    known = sorted(CARDS, key=len, reverse=True)
    key = next(
        (card for card in known if re.match(re.escape(card.upper()) + r"(?![0-9A-Z])", plain)), None
    )
    piece = _SLICE.search(plain)
    if plain.startswith("A100"):
        # A slice has less memory than its card.
        small = "40GB" in plain or (
            memory_bytes is not None and memory_bytes < 50 * GIB and not piece
        )
        key = "A100-40GB" if small else "A100-80GB"
    if key is None:
        return None
    card = CARDS[key]
    if piece is None:
        return card
    share = int(piece[1]) / _SLICES.get(key, 7)
    return replace(card, flops=share * card.flops, fp32_flops=share * card.fp32_flops)
