"""Every placement trains on pretend GPUs as it does on a CPU, from start to resume, and the host
waits for them rarely.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support import largest_difference, matrix, train_engines

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("pretend_gpu")]

PLACEMENTS = [
    *(
        (stage, rung)
        for stage, rungs in {0: ["none"], 1: ["none", "optimizer_cpu"]}.items()
        for rung in rungs
    ),
    *((2, rung) for rung in ("none", "optimizer_cpu")),
    *((3, rung) for rung in ("none", "optimizer_cpu", "cpu", "optimizer_nvme", "nvme")),
]
TUNERS, PRECISIONS, ROWS, RANKS = (
    ["full", "lora"],
    ["fp32", "bf16", "fp16"],
    ["padded", "packed"],
    [1, 2],
)

#: Largest difference of a loss of about 6. In 16 bits two ranks round other sums: 2.04e-4 was seen,
#: with one thread.
CLOSE = {"fp32": 1e-6, "bf16": 4e-4, "fp16": 4e-4}
STEPS, SAVED = 3, 1


def is_placement(*cell: Any) -> bool:
    """Adapters have no optimizer worth a disk, and fp16 is not offloaded."""
    (_, rung), *others = cell
    return (rung, "lora") != ("optimizer_nvme", *others[:1]) and not (
        rung != "none" and "fp16" in others
    )


def overrides(cell: tuple[Any, ...], cache: Path, folder: Path) -> list[str]:
    (stage, rung), tuner, precision, rows, *_ = cell
    return [
        "model=tiny",
        "model.attn_implementation=eager",
        "data.max_seq_length=256",
        "optim.learning_rate=1e-3",
        "train.global_batch_size=4",
        "train.per_device_train_batch_size=1",
        "train.gradient_checkpointing=true",
        f"zero={stage}",
        f"offload={rung}",
        f"tuner={tuner}",
        f"precision={precision}",
        f"data.packing={rows == 'packed'}",
        *(f"offload.nvme_path={folder}", f"paths.cache_dir={cache}"),
    ]


Kind = tuple[str, str, str]


@pytest.fixture(scope="module")
def curves(
    cache: Path, nursery: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[Kind, list[float]]:
    """The losses of each tuner, precision and kind of rows, without placement, on a CPU."""
    folder = tmp_path_factory.mktemp("curves")
    kinds = list(itertools.product(TUNERS, PRECISIONS, ROWS))
    tasks = [
        {"overrides": overrides(((0, "none"), *kind), cache, folder), "first": 0, "last": STEPS}
        for kind in kinds
    ]
    results = train_engines(tasks, 1, folder)
    return {kind: result["losses"] for kind, result in zip(kinds, results, strict=True)}


@pytest.mark.parametrize(
    "cells",
    matrix(
        PLACEMENTS,
        TUNERS,
        PRECISIONS,
        ROWS,
        RANKS,
        size=3,
        allowed=is_placement,
        once=True,
        parts=2,
    ),
)
def test_losses_saves_and_resumed_runs_are_those_of_a_cpu(
    cells: list[Any], curves: dict[Kind, list[float]], cache: Path, tmp_path: Path
) -> None:
    for ranks in RANKS:
        mine = [cell for cell in cells if cell[4] == ranks]
        tasks = [
            task
            for number, cell in enumerate(mine)
            for task in _train_and_resume(cell, number, cache, tmp_path)
        ]
        results = train_engines(tasks, ranks, tmp_path, module="tests.cuda.worker") if tasks else []
        for cell, whole, resumed in zip(mine, results[::2], results[1::2], strict=True):
            close = CLOSE[cell[2]]
            assert largest_difference(whole["losses"], curves[cell[1:4]]) <= close, cell
            assert largest_difference(resumed["losses"], whole["losses"][SAVED:]) <= close / 10, (
                cell
            )
            assert all(whole["applied"]), cell
            _check_waits(cell, whole["waits"])


@pytest.mark.slow
def test_lion_computes_what_it_does_on_a_cpu_and_waits_no_more(cache: Path, tmp_path: Path) -> None:
    lion = ("optim=lion", "optim.learning_rate=2e-4", "optim.weight_decay=0.1")
    cells = [
        ((0, "none"), "full", "bf16", "padded", 1),
        ((1, "optimizer_cpu"), "lora", "fp32", "padded", 1),
        ((2, "none"), "lora", "fp16", "padded", 1),
        ((3, "optimizer_nvme"), "full", "fp32", "padded", 1),
    ]
    plain = [
        {
            "overrides": [*overrides(((0, "none"), *cell[1:]), cache, tmp_path), *lion],
            "first": 0,
            "last": STEPS,
        }
        for cell in cells
    ]
    on_cpu = train_engines(plain, 1, tmp_path)
    tasks = [
        task
        for number, cell in enumerate(cells)
        for task in _train_and_resume(cell, number, cache, tmp_path, *lion)
    ]
    results = train_engines(tasks, 1, tmp_path, module="tests.cuda.worker")
    for cell, known, whole, resumed in zip(cells, on_cpu, results[::2], results[1::2], strict=True):
        assert largest_difference(whole["losses"], known["losses"]) <= CLOSE[cell[2]], cell
        assert resumed["losses"] == whole["losses"][SAVED:], cell
        _check_waits(cell, whole["waits"])


def _train_and_resume(
    cell: Any, number: int, cache: Path, tmp_path: Path, *more: str
) -> list[dict[str, Any]]:
    """The whole run, saved on the way while it trains on; and its second half from there."""
    given = [*overrides(cell, cache, tmp_path), "hardware.accelerator=cuda", *more]
    place = str(tmp_path / f"{cell[4]}-{number}" / f"checkpoint-{SAVED}")
    save = {"save": place, "save_at": SAVED, "background": True}
    return [
        {"overrides": given, "first": 0, "last": STEPS, **save},
        {"overrides": given, "first": SAVED, "last": STEPS, "load": place},
    ]


#: Where DeepSpeed itself waits in each micro-batch: it reduces stage 3's gradients, gives the
#: host's buffers free, and brings weights from the host.
OF_DEEPSPEED = re.compile(
    r"(stream|event|copy to device|device) at"
    r" deepspeed/runtime/zero/(stage3|stage_1_and_2|partition_parameters)\.py"
)


def _check_waits(cell: Any, steps: list[dict[str, Any]]) -> None:
    """A few in a step, none in a micro-batch, none for each tensor."""
    for step in steps[1:]:
        places = {
            place: count for place, count in step["places"].items() if not OF_DEEPSPEED.match(place)
        }
        # Whether all gradients are finite, their norm, the loss, and the same from the other ranks.
        assert sum(places.values()) <= 9, (cell, places)
        assert max(places.values()) <= 3, (cell, places)


def test_overlapped_reductions_give_the_same_curve(cache: Path, tmp_path: Path) -> None:
    """Two micro-batches a step, and buckets on a stream of their own."""
    given = [
        *overrides(((2, "none"), "full", "bf16", "padded"), cache, tmp_path),
        "hardware.accelerator=cuda",
    ]
    key = "zero.deepspeed.zero_optimization.overlap_comm"
    tasks = [
        {"overrides": [*given, f"{key}={overlaps}"], "first": 0, "last": STEPS}
        for overlaps in ("true", "false")
    ]
    overlapped, plain = train_engines(tasks, 2, tmp_path, module="tests.cuda.worker")
    assert overlapped["losses"] == plain["losses"]
    assert overlapped["norms"] == plain["norms"]
    _check_waits("overlapped", overlapped["waits"])


@pytest.mark.slow
def test_hpz_trains_on_the_weights_of_the_files(cache: Path, tmp_path: Path) -> None:
    """Its second slice, from which nodes gather among themselves, is cut before the weights are
    read.
    """
    hpz = "zero.deepspeed.zero_optimization.zero_hpz_partition_size=2"
    cells = [((3, "none"), tuner, "fp32", "padded") for tuner in TUNERS]
    plain: list[dict[str, Any]] = [
        {"overrides": overrides(cell, cache, tmp_path), "first": 0, "last": 3} for cell in cells
    ]
    split = [{**task, "overrides": [*task["overrides"], hpz]} for task in plain]
    found = train_engines([*plain, *split], 2, tmp_path)
    assert [result["losses"] for result in found[2:]] == [result["losses"] for result in found[:2]]


def test_a_device_that_is_full_is_out_of_device_memory(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETEND_LIMIT", "1500000")
    given = [
        *overrides(((0, "none"), "full", "fp32", "padded"), cache, tmp_path),
        "hardware.accelerator=cuda",
    ]
    task = {"overrides": given, "first": 0, "last": 1, "may_fail": True}
    (result,) = train_engines([task], 1, tmp_path, module="tests.cuda.worker")
    assert result["pool"] == "device"
    assert "CUDA out of memory" in result["error"]
