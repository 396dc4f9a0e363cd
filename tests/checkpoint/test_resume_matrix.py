"""A checkpoint does not know where it came from: every placement goes on exactly, and reads what
every other wrote.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.support import largest_difference, matrix, pairs, train_engines

#: Wide enough that states and weights are really swapped to NVMe.
BASE = [
    *("model=tiny", "model.config.hidden_size=512", "model.config.intermediate_size=1024"),
    "model.config.num_attention_heads=8",
    "model.config.num_key_value_heads=8",
    "model.config.head_dim=64",
    "model.config.num_hidden_layers=1",
    "data.train=stdlib_docs@200",
    "data.max_seq_length=256",
    "data.overlong=truncate",
    "train.global_batch_size=4",
]
RATE = {"full": "optim.learning_rate=1e-3", "lora": "optim.learning_rate=1e-2"}

#: (ZeRO stage, rung)
PLACES = [
    ("0", "none"),
    ("1", "none"),
    ("2", "none"),
    ("3", "none"),
    ("1", "optimizer_cpu"),
    ("2", "optimizer_cpu"),
    *(("3", "optimizer_cpu"), ("3", "cpu"), ("3", "optimizer_nvme"), ("3", "nvme")),
]
TUNERS, PRECISIONS, RANKS = ("full", "lora"), ("fp32", "bf16"), (2, 1)
FIRST, LAST = 3, 5

#: Between curves that add the same numbers in another order. From the third step to the last the
#: loss falls by hundreds of times as much, so that what goes on from another state is seen.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}

Place = tuple[str, str]


def has_tuner(place: Place, tuner: str = "full", *_: Any) -> bool:
    """``optimizer_nvme`` is for full fine-tuning: the states of adapters are too small for a
    disk.
    """
    return tuner == "full" or place[1] != "optimizer_nvme"


def task(cell: tuple[Any, ...], folder: Path, **more: Any) -> dict[str, Any]:
    """One engine of a cell (place, tuner, precision, ranks ...)."""
    (stage, rung), tuner, precision, *_ = cell
    overrides = [
        *BASE,
        RATE[tuner],
        f"tuner={tuner}",
        f"precision={precision}",
        f"zero={stage}",
        f"offload={rung}",
    ]
    return {"overrides": [*overrides, f"offload.nvme_path={folder}/nvme"], "last": LAST, **more}


def run_cells(more: dict[Any, dict[str, Any]], ranks: int, folder: Path) -> dict[Any, Any]:
    """The losses of an engine of each cell, on this number of ranks, in one process group.

    Args:
        more: Cell -> what its task says beside the configuration.
    """
    tasks = [task(cell, folder, **given) for cell, given in more.items()]
    found = train_engines(tasks, ranks, folder, timeout=2400) if tasks else []
    return {cell: result["losses"] for cell, result in zip(more, found, strict=True)}


def load_from(folders: dict[Any, str]) -> dict[Any, dict[str, Any]]:
    """Cell -> a task that goes on from this folder."""
    return {cell: {"first": FIRST, "load": folder} for cell, folder in folders.items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[float]]:
    """The curve of each tuner and precision on one rank without ZeRO, which is that of every
    placement.
    """
    cells = {
        (PLACES[0], tuner, precision): {"first": 0} for tuner in TUNERS for precision in PRECISIONS
    }
    found = run_cells(cells, 1, tmp_path_factory.mktemp("plain"))
    for losses in found.values():
        assert losses[-1] < losses[0] - 0.5, "the model must learn"
        assert abs(losses[FIRST] - losses[0]) > 100 * TOLERANCE["bf16"]
    return {cell[1:]: losses for cell, losses in found.items()}


def write_all(
    cells: list[Any], ranks: int, folder: Path, plain: dict[Any, list[float]]
) -> tuple[dict[Any, str], dict[Any, list[float]]]:
    """Checkpoints of every cell, written in the background while training went on, and the losses
    of whole runs.
    """
    names = {cell: "-".join(map(str, (ranks, *cell[0], *cell[1:]))) for cell in cells}
    folders = {cell: str(folder / name / f"checkpoint-{FIRST}") for cell, name in names.items()}
    saving = {
        cell: {"first": 0, "save": where, "save_at": FIRST, "background": True}
        for cell, where in folders.items()
    }
    found = run_cells(saving, ranks, folder)
    for cell, losses in found.items():
        assert largest_difference(losses, plain[cell[1:3]]) < TOLERANCE[cell[2]], cell
    return folders, found


@pytest.mark.process
@pytest.mark.parametrize(
    "cells",
    matrix(PLACES, TUNERS, PRECISIONS, RANKS, size=4, allowed=has_tuner, once=True, parts=2),
)
def test_every_placement_goes_on_to_the_last_digit(
    cells: list[Any], plain: dict[Any, list[float]], tmp_path: Path
) -> None:
    """On as many ranks exactly; on another number of ranks from the placement before it in the
    list, closely.

    The loading process starts from other seeds.
    """
    for ranks in RANKS:
        of_ranks = [cell for cell in cells if cell[3] == ranks]
        folders, whole = write_all(of_ranks, ranks, tmp_path, plain)
        same = run_cells(load_from(folders), ranks, tmp_path)
        for cell, losses in same.items():
            assert losses == whole[cell][FIRST:], cell
        before = neighbors(of_ranks)
        moved = run_cells(
            load_from({cell: folders[before[cell]] for cell in of_ranks}), 3 - ranks, tmp_path
        )
        for cell, losses in moved.items():
            assert largest_difference(losses, whole[before[cell]][FIRST:]) < TOLERANCE[cell[2]], (
                before[cell],
                cell,
            )


def neighbors(cells: list[Any]) -> dict[Any, Any]:
    """Cell -> the one before it of those with its tuner and precision, the last one for the
    first.
    """
    groups: dict[Any, list[Any]] = {}
    for cell in cells:
        groups.setdefault(cell[1:3], []).append(cell)
    return {
        cell: group[number - 1] for group in groups.values() for number, cell in enumerate(group)
    }


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize(("written_on", "read_on"), [(2, 1), (1, 2)])
def test_every_placement_reads_what_every_other_wrote(
    tuner: str, written_on: int, read_on: int, plain: dict[Any, list[float]], tmp_path: Path
) -> None:
    cells = [(place, tuner, "fp32") for place in PLACES if has_tuner(place, tuner)]
    folders, whole = write_all(cells, written_on, tmp_path, plain)
    for written in cells:
        read = run_cells(
            load_from({cell: folders[written] for cell in cells if cell != written}),
            read_on,
            tmp_path,
        )
        for cell, losses in read.items():
            assert largest_difference(losses, whole[written][FIRST:]) < TOLERANCE["fp32"], (
                written,
                cell,
            )


def test_pairs_are_really_covered() -> None:
    """The covering array leaves out no pair that the full product has."""
    factors: tuple[Any, ...] = (PLACES, TUNERS, PRECISIONS, RANKS)
    cells = pairs(*factors, allowed=has_tuner)
    for first, second in itertools.combinations(range(4), 2):
        wanted = {(a, b) for a, b in itertools.product(factors[first], factors[second])}
        if (first, second) == (0, 1):
            wanted = {pair for pair in wanted if has_tuner(*pair)}
        assert {(cell[first], cell[second]) for cell in cells} == wanted
    assert len(cells) <= 24
