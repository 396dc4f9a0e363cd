"""``python -m scripts.memory_table``: plan models on cards; writes the table of ``docs/memory.md``.

With ``--check`` nothing is written, and the exit code is 1 where the table is not what the plans
say. Machines are named, so that the numbers are the same wherever it runs; the first time it takes
some minutes, in which activations are traced.
"""

from __future__ import annotations

import sys
from pathlib import Path

from llmtune.config.compose import compose_config
from llmtune.plan.ladder import Ladder
from llmtune.plan.resolve import resolve_ladder
from llmtune.units import format_bytes, format_count

PAGE = Path(__file__).parent.parent / "docs/memory.md"
BEGIN, END = "<!-- table: python -m scripts.memory_table -->", "<!-- end of table -->"

MODELS = (
    "smollm2_360m",
    "llama32_1b",
    "llama32_3b",
    "llama3_8b",
    "qwen3_14b",
    "qwen3_32b",
    "llama3_70b",
)
TUNERS = ("qlora", "lora", "full")
#: Title of a column -> the machine.
CARDS = {
    "RTX 4090, 24 GB; host 64 GB": ("hardware=1xrtx4090",),
    "A100, 40 GB; host 128 GB": (
        "hardware=8xa100_40gb",
        "hardware.gpus_per_node=1",
        "hardware.host_memory_bytes=128GiB",
    ),
    "H100, 80 GB; host 256 GB": (
        "hardware=8xh100",
        "hardware.gpus_per_node=1",
        "hardware.host_memory_bytes=256GiB",
    ),
    "H200, 141 GB; host 256 GB": ("hardware=1xh200",),
    "8 x A100, 80 GB; host 1 TB": ("hardware=8xa100_80gb",),
}


def plan_cell(model: str, tuner: str, machine: tuple[str, ...]) -> Ladder:
    """Plan one cell: rows of 2,048 tokens, all else as llmtune chooses it."""
    overrides = [f"model={model}", f"tuner={tuner}", *machine]
    return resolve_ladder(compose_config(overrides, planning=True).config, planning=True)


def make_cell(ladder: Ladder) -> str:
    """Return the placement that is chosen, with what it takes of a GPU."""
    chosen = ladder.chosen
    if chosen is None:
        return "-"
    used = format_bytes(chosen.memory.device.total)
    speed = chosen.speed.tokens_per_second
    return f"{used}, `{chosen.placement.rung}`, {speed:,.0f}"


def make_row(model: str, tuner: str) -> str:
    """Return the line of a model and a tuner."""
    ladders = [plan_cell(model, tuner, machine) for machine in CARDS.values()]
    shape = ladders[0].shape
    cells = [
        f"`{model}`",
        format_count(shape.parameters),
        f"`{tuner}`",
        *map(make_cell, ladders),
    ]
    return f"| {' | '.join(cells)} |"


def read_rows(page: str) -> dict[tuple[str, str], str]:
    """Return the lines of the page's table by model and tuner."""
    lines = page.split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    return {(line.split("`")[1], line.split("`")[3]): line for line in lines}


def make_table() -> str:
    """Return the whole table."""
    titles = ["`model=`", "parameters", "`tuner=`", *CARDS]
    rows = [make_row(model, tuner) for model in MODELS for tuner in TUNERS]
    return "\n".join([f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|", *rows])


def main() -> int:
    """Write the table between its marks, or compare."""
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    made = f"{before}{BEGIN}\n\n{make_table()}\n\n{END}{rest.split(END, 1)[1]}"
    if "--check" in sys.argv[1:]:
        if made != page:
            sys.stderr.write(f"{PAGE.name}: run python -m scripts.memory_table\n")
        return int(made != page)
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
