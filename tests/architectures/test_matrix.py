"""Two steps of every architecture are those of plain PyTorch, under ZeRO 0 and 3, full and LoRA,
packed and not; or refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtune.varlen_attention import VARLEN
from tests.architectures.families import FAMILIES, MIXING, USUAL, WHOLE
from tests.support import largest_difference, matrix, product, train_engines

pytestmark = pytest.mark.process

STAGES, TUNERS, ROWS = (0, 3), ("full", "lora"), ("padded", "packed")

#: Cells of a process, which takes a few seconds to start.
SIZE = 17


def all_cells(families: list[str]) -> list[Any]:
    """For ``parametrize``, in the slow tier."""
    cells = product(families, STAGES, TUNERS, ROWS)
    parts = [cells[start : start + SIZE] for start in range(0, len(cells), SIZE)]
    return [
        pytest.param(part, id=f"{part[0][0]} to {part[-1][0]} {number}", marks=pytest.mark.slow)
        for number, part in enumerate(parts)
    ]


@pytest.mark.parametrize(
    "cells",
    [
        *matrix(list(USUAL), STAGES, TUNERS, ROWS, size=SIZE),
        *all_cells([family for family in FAMILIES if family not in USUAL]),
    ],
)
def test_two_steps_are_those_of_plain_pytorch_or_refused(cells: list[Any], tmp_path: Path) -> None:
    for cell, found in zip(
        cells, train_engines(cells, 1, tmp_path, module="tests.architectures.worker"), strict=True
    ):
        family, stage, _, rows = cell
        assert "error" not in found, (cell, found["error"])
        if stage == 3 and family in WHOLE:
            assert found["code"] == 2, cell
            assert "uses weights without calling the layers that own them" in found["refused"], cell
        elif rows == "packed" and family in MIXING:
            assert found["code"] == 2, cell
            assert "does not keep the documents of a row apart" in found["refused"], cell
        else:
            assert "refused" not in found, (cell, found["refused"])
            assert found["unplanned"] == [], (
                cell,
                "the plan counts other tensors than are trained",
            )
            assert largest_difference(found["losses"], found["plain"]) < 1e-5, (cell, found)
            norms = zip(found["norms"], found["plain_norms"], strict=True)
            assert all(abs(norm - plain) < 1e-4 * max(plain, 0.1) for norm, plain in norms), (
                cell,
                found,
            )


def test_two_ranks_share_weights_that_are_computed_from_several_or_read_into_buffers(
    tmp_path: Path,
) -> None:
    """Stacked experts, a correction of the router that is a buffer, and names that transformers
    translates, in two slices.
    """
    families = ("mixtral", "deepseek_v3", "gpt_neox", "gemma3_text", "apertus")
    cells = [(family, 3, "full", "packed") for family in families]
    for cell, found in zip(
        cells, train_engines(cells, 2, tmp_path, module="tests.architectures.worker"), strict=True
    ):
        assert "losses" in found, (cell, found)
        assert largest_difference(found["losses"], found["plain"]) < 1e-5, (cell, found)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_try_the_model_itself_and_refuse_together(ranks: int, tmp_path: Path) -> None:
    """Without the trial before the ranks, as where no small model can be made.

    A rank that went on alone would hang.
    """
    cells = [
        (family, 3, "lora", "unchecked") for family in ("mamba", "llama", "qwen3_next", "rwkv")
    ]
    found = train_engines(cells, ranks, tmp_path, module="tests.architectures.worker", timeout=120)
    assert [result.get("code", 0) for result in found] == [2, 0, 2, 2]
    for result in found:
        assert (
            "losses" in result or "does not keep the documents of a row apart" in result["refused"]
        )


def test_the_table_covers_what_the_field_trains() -> None:
    assert len(USUAL) >= 25
    assert set(USUAL) | MIXING | WHOLE <= set(FAMILIES)


def shared_cells(families: list[str]) -> list[Any]:
    """One cell of each family, with stages, tuners and rows in turn."""
    ways = product(STAGES, TUNERS, ROWS)
    return [(family, *ways[index % len(ways)], "shared") for index, family in enumerate(families)]


@pytest.mark.parametrize(
    "cells",
    [
        pytest.param(shared_cells(["llama", "gemma3_text", "gpt_neox", "mixtral"]), id="some"),
        pytest.param(shared_cells(list(FAMILIES)), id="all", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_that_share_the_tokens_of_rows_train_as_one(
    cells: list[Any], tmp_path: Path
) -> None:
    shared = 0
    for cell, found in zip(
        cells,
        train_engines(cells, 2, tmp_path, timeout=900, module="tests.architectures.worker"),
        strict=True,
    ):
        assert "error" not in found, (cell, found["error"])
        if VARLEN not in found["kernels"] or "refused" in found:
            assert found["code"] == 2, (cell, found)
            continue
        shared += 1
        assert largest_difference(found["losses"], found["plain"]) < 1e-5, (cell, found)
        norms = zip(found["norms"], found["plain_norms"], strict=True)
        assert all(abs(norm - plain) < 1e-4 * max(plain, 0.1) for norm, plain in norms), (
            cell,
            found,
        )
    assert shared > len(cells) / 2
