"""An optimizer that llmtune brings itself, in DeepSpeed's wrappers.

It gives the same curve on every rung, and is resumed to the last digit.

That its memory is as planned: ``tests/engine/test_states.py``; that its losses are those of plain
PyTorch: ``tests/train/test_plain_loop.py``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_resume_matrix import BASE, FIRST, LAST, PLACES, TOLERANCE
from tests.support import ROOT, first, largest_difference, product, train_engines

LION = ["optim=lion", "optim.learning_rate=2e-4", "optim.weight_decay=0.1"]
GROUPS = (
    "optim.param_groups=[{pattern: embed, learning_rate: 2e-4},"
    " {pattern: 'mlp|norm', weight_decay: 0.5, learning_rate: 2e-3}]"
)
ADAMW = ["optim.learning_rate=1e-3", "optim.weight_decay=0.1", GROUPS]
MUON = ["optim=muon", "optim.learning_rate=1e-3", "optim.weight_decay=0.1", GROUPS]
ADAFACTOR = ["optim=adafactor", "optim.learning_rate=1e-3", "optim.weight_decay=0.1"]
#: Muon's iteration is in bf16, whatever the precision: another order of the same sums moves digits.
MUON_TOLERANCE = {"fp32": 5e-3, "bf16": 2e-2}
#: Rungs of an optimizer that is not on NVMe.
IN_MEMORY = [place for place in PLACES if "nvme" not in place[1]]


def tasks(
    optim: list[str],
    places: list[tuple[str, str]],
    folder: Path,
    precisions: list[str],
    **more: Any,
) -> list[dict[str, Any]]:
    """An engine on each rung."""
    return [
        {
            "overrides": [
                *BASE,
                *optim,
                "tuner=full",
                f"precision={precision}",
                *(f"zero={stage}", f"offload={rung}", f"offload.nvme_path={folder}/nvme"),
            ],
            "last": LAST,
            **more,
        }
        for (stage, rung), precision in zip(places, precisions, strict=True)
    ]


@pytest.mark.process
@pytest.mark.parametrize(
    "places",
    first(1, [[("3", "optimizer_nvme")], PLACES]),
    ids=len,
)
def test_lion_is_the_same_on_every_rung_and_resumes_to_the_last_digit(
    places: list[tuple[str, str]], tmp_path: Path
) -> None:
    check_rungs(LION, places, TOLERANCE, tmp_path)


@pytest.mark.process
@pytest.mark.parametrize(
    "places",
    first(1, [[("3", "nvme")], PLACES]),
    ids=len,
)
def test_so_are_groups_of_parameters(places: list[tuple[str, str]], tmp_path: Path) -> None:
    check_rungs(ADAMW, places, TOLERANCE, tmp_path)


@pytest.mark.process
@pytest.mark.parametrize(
    "precisions", [["bf16"], pytest.param(["fp32", "bf16"], marks=pytest.mark.slow)], ids=len
)
@pytest.mark.slow
def test_adafactor_resumes_to_the_last_digit(precisions: list[str], tmp_path: Path) -> None:
    """On two ranks, of which each wrote a half of the master weights, and on one from theirs."""
    folders = [f"{tmp_path}/{precision}/checkpoint-{FIRST}" for precision in precisions]
    places = [("0", "none")] * len(precisions)
    saving = [
        {**task, "save": folder}
        for task, folder in zip(
            tasks(ADAFACTOR, places, tmp_path, precisions, first=0, save_at=FIRST, background=True),
            folders,
            strict=True,
        )
    ]
    whole = [result["losses"] for result in train_engines(saving, 2, tmp_path)]
    loading = [
        {**task, "load": folder}
        for task, folder in zip(
            tasks(ADAFACTOR, places, tmp_path, precisions, first=FIRST), folders, strict=True
        )
    ]
    resumed = [result["losses"] for result in train_engines(loading, 2, tmp_path)]
    elsewhere = [result["losses"] for result in train_engines(loading, 1, tmp_path)]
    for precision, losses, rest, moved in zip(precisions, whole, resumed, elsewhere, strict=True):
        assert losses[-1] < losses[0] - 0.3, "the model must learn"
        assert rest == losses[FIRST:]
        assert largest_difference(moved, losses[FIRST:]) < TOLERANCE[precision]


@pytest.mark.process
@pytest.mark.slow
def test_so_is_muon(tmp_path: Path) -> None:
    check_rungs(MUON, IN_MEMORY, MUON_TOLERANCE, tmp_path)


def check_rungs(
    optim: list[str], places: list[tuple[str, str]], tolerance: dict[str, float], tmp_path: Path
) -> None:
    """Train on every rung with 2 ranks, go on from a checkpoint there, and from another one's on 1
    rank.
    """
    precisions = [("fp32", "bf16")[index // 2 % 2] for index in range(len(places))]
    folders = [str(tmp_path / f"{stage}-{rung}/checkpoint-{FIRST}") for stage, rung in places]
    saving = [
        {**task, "save": folder}
        for task, folder in zip(
            tasks(optim, places, tmp_path, precisions, first=0, save_at=FIRST, background=True),
            folders,
            strict=True,
        )
    ]
    whole = [result["losses"] for result in train_engines(saving, 2, tmp_path, timeout=900)]
    first: dict[str, list[float]] = {}
    for place, precision, losses in zip(places, precisions, whole, strict=True):
        reference = first.setdefault(precision, losses)
        assert losses[-1] < losses[0] - 0.3, "the model must learn"
        assert largest_difference(losses, reference) < tolerance[precision], place

    loading = [
        {**task, "load": folder}
        for task, folder in zip(
            tasks(optim, places, tmp_path, precisions, first=FIRST), folders, strict=True
        )
    ]
    resumed = [result["losses"] for result in train_engines(loading, 2, tmp_path, timeout=900)]
    for place, losses, rest in zip(places, whole, resumed, strict=True):
        assert rest == losses[FIRST:], place
    # And on one rank, from what the rung before it of that precision wrote.
    before = [
        max((other for other in range(index) if precisions[other] == precision), default=index)
        for index, precision in enumerate(precisions)
    ]
    moved = [
        {**task, "load": folders[origin]}
        for task, origin in zip(
            tasks(optim, places, tmp_path, precisions, first=FIRST), before, strict=True
        )
    ]
    elsewhere = [result["losses"] for result in train_engines(moved, 1, tmp_path, timeout=900)]
    for precision, origin, rest in zip(precisions, before, elsewhere, strict=True):
        assert largest_difference(rest, whole[origin][FIRST:]) < tolerance[precision]


LOW_PRECISION = ["adamw_bf16", "adamw_8bit", "adamw_bf16 optim.rounding=kahan"]
#: Placements that such an optimizer claims.
CLAIMED = [place for place in PLACES if place[0] != "0" and "nvme" not in place[1]]


@pytest.mark.process
@pytest.mark.parametrize(
    "cells",
    [
        [(LOW_PRECISION[0], ("3", "none")), *product(LOW_PRECISION[1:2], [CLAIMED[2], CLAIMED[4]])],
        pytest.param(product(LOW_PRECISION, CLAIMED), marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_low_precision_is_the_same_on_every_rung_and_resumes_to_the_last_digit(
    cells: list[tuple[str, tuple[str, str]]], tmp_path: Path
) -> None:
    """Bits and blocks follow parameters and not layouts, so that rungs of ZeRO 2 and 3 agree in
    every digit; ZeRO 1 adds up micro-batches in another order.
    """
    folders = [str(tmp_path / f"{index}/checkpoint-{FIRST}") for index in range(len(cells))]

    def task(optimizer: str, place: tuple[str, str], **more: Any) -> dict[str, Any]:
        overrides = [*BASE, "tuner=full", "precision=bf16", "optim.learning_rate=1e-3"]
        overrides += [*f"optim={optimizer}".split(), f"zero={place[0]}", f"offload={place[1]}"]
        return {"overrides": overrides, "last": LAST, **more}

    saving = [
        task(*cell, first=0, save=folder, save_at=FIRST, background=True)
        for cell, folder in zip(cells, folders, strict=True)
    ]
    in_fp32 = task("adamw", ("3", "none"), first=0)
    *whole, known = [
        result["losses"] for result in train_engines([*saving, in_fp32], 2, tmp_path, timeout=900)
    ]
    loading = [
        task(*cell, first=FIRST, load=folder) for cell, folder in zip(cells, folders, strict=True)
    ]
    resumed = [result["losses"] for result in train_engines(loading, 2, tmp_path, timeout=900)]
    exact: dict[str, list[float]] = {}
    for (optimizer, place), losses, rest in zip(cells, whole, resumed, strict=True):
        assert largest_difference(losses, known) < TOLERANCE["bf16"], (optimizer, place)
        assert rest == losses[FIRST:], (optimizer, place)
        if place[0] != "1":
            assert losses == exact.setdefault(optimizer, losses), (optimizer, place)

    # On one rank, blocks that two ranks had cut are whole again.
    elsewhere = train_engines(loading, 1, tmp_path, timeout=900)
    for losses, result in zip(whole, elsewhere, strict=True):
        assert largest_difference(result["losses"], losses[FIRST:]) < TOLERANCE["bf16"]


#: Steps of the bench's job.
STEPS = 8


def load_bench() -> Any:
    spec = importlib.util.spec_from_file_location(
        "bench_optimizers", ROOT / "scripts/bench/optimizers.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.process
@pytest.mark.slow
def test_rounding_stochastically_follows_fp32_and_to_the_nearest_does_not(tmp_path: Path) -> None:
    """SmolLM2 on 2 ranks, as ``scripts/bench/optimizers.py`` trains it; see docs/planner.md."""
    bench = load_bench()
    rows = bench.write_rows(tmp_path / "rows.jsonl")
    jobs = {
        "fp32": bench.REFERENCE,
        **{name: bench.OPTIMIZERS[name][0] for name in ("adamw_bf16", "adamw_bf16_nearest")},
    }
    known, stochastic, nearest = (
        bench.train(overrides, "none", rows, STEPS) for overrides in jobs.values()
    )
    assert largest_difference(stochastic, known) < 0.06
    assert largest_difference(nearest, known) > 0.1
