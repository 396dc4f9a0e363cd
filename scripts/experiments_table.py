"""``python -m scripts.experiments_table``: plan every experiment; writes the README's table.

With ``--check`` nothing is written, and the exit code is 1 where the table is not what the plans
say. Machines are named, so that the numbers are the same wherever it runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from llmtune.cli.plan import host_bytes
from llmtune.config.compose import compose_config
from llmtune.plan.ladder import Ladder
from llmtune.plan.resolve import resolve_ladder
from llmtune.units import format_bytes

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "README.md"
BEGIN, END = "<!-- table: python -m scripts.experiments_table -->", "<!-- end of table -->"
HEADER = (
    "| `experiment=` | `hardware=` | placement | micro-batch | a GPU | host | NVMe | checkpoint |"
    " tokens/s |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)

#: Experiments that run on the machine where they are started -> the machine of the table.
MACHINES = {
    "llama2_7b_lora": "1xrtx4090",
    "llama3_8b_classifier_lora": "1xrtx4090",
    "minilm_docstrings": "laptop",
    "roberta_large_classification": "1xrtx4090",
}


def list_experiments() -> list[str]:
    """Return the names of all experiments."""
    return sorted(file.stem for file in (ROOT / "conf/experiment").glob("*.yaml"))


def plan_experiment(name: str) -> tuple[Ladder, str]:
    """Plan an experiment on its machine; return the ladder and the machine's name."""
    machine = MACHINES.get(name)
    overrides = [f"experiment={name}", *([f"hardware={machine}"] if machine else [])]
    composed = compose_config(overrides, planning=True)
    return resolve_ladder(composed.config, planning=True), str(composed.choices["hardware"])


def make_row(name: str) -> str:
    """Return the line of an experiment; bytes of host, NVMe and checkpoint are one machine's."""
    ladder, machine = plan_experiment(name)
    chosen = ladder.chosen
    if chosen is None or ladder.refusals:
        raise SystemExit(f"experiment={name} is not for hardware={machine}: {ladder.refusals}")
    rung = next(rung for rung in ladder.rungs if rung.candidate is chosen)
    nvme = chosen.memory.nvme * ladder.cluster.ranks_on_node
    on_cpu = ladder.hardware.accelerator == "cpu"
    cells = [
        f"`{name}`",
        f"`{machine}`",
        f"`{rung.name}`, ZeRO {chosen.placement.zero_stage}",
        f"{chosen.batch.micro_batch_size}",
        "-" if on_cpu else format_bytes(chosen.memory.device.total),
        format_bytes(host_bytes(rung, ladder)),
        format_bytes(nvme) if nvme else "-",
        format_bytes(chosen.memory.checkpoint),
        f"{chosen.speed.tokens_per_second:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def read_rows(page: str) -> dict[str, str]:
    """Return the lines of the page's table by experiment."""
    lines = _table(page)[1].strip().splitlines()[2:]
    return {line.split("`")[1]: line for line in lines}


def make_table() -> str:
    """Return the whole table."""
    return "\n".join([HEADER, *map(make_row, list_experiments())])


def _table(page: str) -> tuple[str, str, str]:
    """Divide a page into what is before the table, the table, and what is behind it."""
    before, rest = page.split(BEGIN)
    table, after = rest.split(END, 1)
    return before, table, after


def main() -> int:
    """Write the table between its marks, or compare."""
    page = PAGE.read_text()
    before, _, after = _table(page)
    made = f"{before}{BEGIN}\n\n{make_table()}\n\n{END}{after}"
    if "--check" in sys.argv[1:]:
        if made != page:
            sys.stderr.write(f"{PAGE.name}: run python -m scripts.experiments_table\n")
        return int(made != page)
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
