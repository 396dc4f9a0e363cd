"""QLoRA in DeepSpeed's engine: the curve of bitsandbytes and peft in plain PyTorch, in every stage,
on one rank and on two, with weights on the host, and over an interruption.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.engine.qlora_reference import train_plainly
from tests.support import first, largest_difference, pairs, product, train_engines

STEPS = 10
PLACES = ((0, "none"), (2, "none"), (3, "none"), (3, "cpu"), (1, "optimizer_cpu"))
FACTORS: Any = (PLACES, (True, False), (False, True), (2, 1))
"""Stage and rung, double quantization, checkpointing, ranks."""
CELLS = pairs(*FACTORS)
#: Gradients are added up in another order and rounded; 7e-5 was seen.
BF16_BOUND = 3e-4
HALF = 5


def overrides(cell: Any, precision: str) -> list[str]:
    (stage, rung), double_quant, recompute, _ = cell
    return [
        *("model=tiny", "data.train=stdlib_docs@200", "data.max_seq_length=256"),
        *("data.overlong=truncate", "optim.learning_rate=2e-3", "tuner=qlora"),
        f"precision={precision}",
        f"tuner.bnb_4bit_use_double_quant={double_quant}",
        f"zero={stage}",
        f"offload={rung}",
        f"train.gradient_checkpointing={recompute}",
    ]


@pytest.fixture(scope="module")
def plain(cache: Path) -> dict[bool, list[float]]:
    """The reference of each kind of scales."""
    return {
        double_quant: train_plainly(
            overrides((PLACES[0], double_quant, False, 1), "fp32"), STEPS, cache
        )
        for double_quant in (True, False)
    }


def check(cells: list[Any], ranks: int, plain: dict[bool, list[float]], folder: Path) -> None:
    tasks = [
        {"overrides": overrides(cell, "fp32"), "first": 0, "last": STEPS}
        for cell in cells
        if cell[-1] == ranks
    ]
    found = train_engines(tasks, ranks, folder, timeout=600)
    of_ranks = [cell for cell in cells if cell[-1] == ranks]
    for cell, result in zip(of_ranks, found, strict=True):
        reference = plain[cell[1]]
        assert reference[-1] < reference[0] - 0.05, "the model must learn"
        assert largest_difference(result["losses"], reference) < 1e-4, cell


@pytest.mark.process
@pytest.mark.parametrize("ranks", first(1, [2, 1]))
def test_every_stage_has_the_curve_of_bitsandbytes_and_peft(
    ranks: int, plain: dict[bool, list[float]], tmp_path: Path
) -> None:
    check(CELLS, ranks, plain, tmp_path)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_other_cells_do_too(ranks: int, plain: dict[bool, list[float]], tmp_path: Path) -> None:
    cells = [cell for cell in product(*FACTORS) if cell not in set(CELLS)]
    check(cells, ranks, plain, tmp_path)


#: In bf16, as it is used on a GPU: stages, double quantization and ranks.
MIXED: Any = product(((0, "none"), (2, "none"), (3, "none")), (True, False), (False,), (1, 2))


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("ranks", [1, 2])
def test_in_bf16_it_is_theirs_too(ranks: int, cache: Path, tmp_path: Path) -> None:
    cells = [cell for cell in MIXED if cell[-1] == ranks]
    tasks = [{"overrides": overrides(cell, "bf16"), "first": 0, "last": STEPS} for cell in cells]
    found = train_engines(tasks, ranks, tmp_path, timeout=600)
    for cell, result in zip(cells, found, strict=True):
        reference = plain_in_bf16(cell[1], cache)
        assert largest_difference(result["losses"], reference) < BF16_BOUND, cell


@functools.cache
def plain_in_bf16(double_quant: bool, cache: Path) -> list[float]:
    """The reference, with adapters in bf16 and their master weights in fp32."""
    return train_plainly(overrides((PLACES[0], double_quant, False, 1), "bf16"), STEPS, cache)


@pytest.mark.process
@pytest.mark.slow
def test_in_bf16_it_is_theirs_and_resumes_as_if_nothing_had_been(
    cache: Path, tmp_path: Path
) -> None:
    """On two ranks; the weights are quantized again, to the same bits."""
    cells = [
        ((2, "none"), True, False, 2),
        ((3, "none"), True, False, 2),
        ((3, "cpu"), True, False, 2),
    ]
    folders = [tmp_path / str(number) / f"checkpoint-{HALF}" for number in range(len(cells))]
    tasks = [{"overrides": overrides(cell, "bf16"), "first": 0, "last": STEPS} for cell in cells]
    saving = [
        {**task, "save": str(folder), "save_at": HALF}
        for task, folder in zip(tasks, folders, strict=True)
    ]
    loading = [
        {**task, "first": HALF, "load": str(folder)}
        for task, folder in zip(tasks, folders, strict=True)
    ]
    found = train_engines([*saving, *loading], 2, tmp_path)
    reference = plain_in_bf16(True, cache)
    for whole, rest in zip(found[: len(cells)], found[len(cells) :], strict=True):
        assert largest_difference(whole["losses"], reference) < BF16_BOUND
        assert rest["losses"] == whole["losses"][HALF:]
        assert rest["norms"] == whole["norms"][HALF:]
