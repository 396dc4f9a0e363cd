"""``python -m scripts.models_table``: train every architecture of ``tests/architectures``; writes
``docs/models.md``'s table.

Run in the repository's root, with llmtune's development requirements; 10 minutes on 2 cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tests.architectures.families import FAMILIES
from tests.support import largest_difference, train_engines

PAGE = Path("docs/models.md")
BEGIN, END = "<!-- table: python -m scripts.models_table -->", "<!-- end of table -->"

STAGES, TUNERS, ROWS = (0, 3), ("full", "lora"), ("padded", "packed")
#: Cells that share a process.
SIZE = 48


def train_all() -> dict[tuple[Any, ...], dict[str, Any]]:
    """What became of every cell."""
    cells = [
        (f, stage, tuner, rows)
        for f in FAMILIES
        for stage in STAGES
        for tuner in TUNERS
        for rows in ROWS
    ]
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, len(cells), SIZE):
            part = cells[start : start + SIZE]
            results = train_engines(
                [list(cell) for cell in part],
                1,
                Path(folder),
                timeout=900,
                module="tests.architectures.worker",
            )
            for cell, result in zip(part, results, strict=True):
                if "error" in result:
                    raise SystemExit(f"{cell} fails: {result['error']}")
                found[cell] = result
            print(f"{len(found)} of {len(cells)} cells")
    return found


def describe(results: list[dict[str, Any]]) -> str:
    """Of cells that differ in the tuner only: the largest difference of a loss, or that they are
    refused.
    """
    refused = sum("refused" in result for result in results)
    if refused:
        return "refused" if refused == len(results) else "refused in part"
    return f"{max(largest_difference(result['losses'], result['plain']) for result in results):.0e}"


def make_table(found: dict[tuple[Any, ...], dict[str, Any]]) -> str:
    """One line an architecture."""
    lines = [
        (
            "| architecture | attention | ZeRO 0 | ZeRO 3 | ZeRO 0, packed | ZeRO 3, packed |"
            " `all-linear` adapts |"
        ),
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for family in FAMILIES:
        about = found[family, 0, "lora", "padded"]
        kernels = (
            ", ".join(about["kernels"])
            .replace("flash_attention_2", "flash")
            .replace("flex_attention", "flex")
        )
        cells = [
            describe([found[family, stage, tuner, rows] for tuner in TUNERS])
            for rows in ROWS
            for stage in STAGES
        ]
        lines.append(
            f"| {family} | {kernels} | {' | '.join(cells)} | {', '.join(about['adapted'])} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Write the table between its marks."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{make_table(train_all())}\n\n{END}{after}")


if __name__ == "__main__":
    main()
