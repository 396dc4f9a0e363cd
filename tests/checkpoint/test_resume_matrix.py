"""A checkpoint does not know where it came from: every placement goes on exactly, and reads what every other wrote."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.support import train_engines

#: Wide enough that states and weights are really swapped to NVMe.
BASE = [
    *("model=tiny", "model.config.hidden_size=512", "model.config.intermediate_size=1024", "precision=fp32"),
    *("model.config.num_attention_heads=8", "model.config.num_key_value_heads=8", "model.config.head_dim=64"),
    *("data.train=stdlib_docs@200", "data.max_seq_length=256", "data.overlong=truncate", "train.global_batch_size=4"),
]
RATE = {"full": "optim.learning_rate=2e-4", "lora": "optim.learning_rate=2e-3"}

#: (ZeRO stage, rung)
PLACES = {
    "full": [
        *(("0", "none"), ("1", "none"), ("2", "none"), ("3", "none"), ("1", "optimizer_cpu"), ("2", "optimizer_cpu")),
        *(("3", "optimizer_cpu"), ("3", "cpu"), ("3", "optimizer_nvme"), ("3", "nvme")),
    ],
    "lora": [
        *(("0", "none"), ("1", "none"), ("2", "none"), ("3", "none"), ("2", "optimizer_cpu"), ("3", "cpu")),
        ("3", "nvme"),
    ],
}
FIRST, LAST = 3, 6


def task(tuner: str, place: tuple[str, str], folder: Path, **more: Any) -> dict[str, Any]:
    stage, rung = place
    overrides = [*BASE, RATE[tuner], f"tuner={tuner}", f"zero={stage}", f"offload={rung}"]
    return {"overrides": [*overrides, f"offload.nvme_path={folder}/nvme"], "last": LAST, **more}


def largest(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) > 0
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def write_all(tuner: str, ranks: int, folder: Path) -> tuple[dict[Any, str], dict[Any, list[float]]]:
    """Checkpoints of every placement, written in the background while training went on, and the losses behind them."""
    places = PLACES[tuner]
    folders = {place: str(folder / f"{ranks}-{'-'.join(place)}" / f"checkpoint-{FIRST}") for place in places}
    tasks = [
        task(tuner, place, folder, first=0, save=folders[place], save_at=FIRST, background=True) for place in places
    ]
    found = train_engines(tasks, ranks, folder)
    losses = {place: result["losses"] for place, result in zip(places, found, strict=True)}
    reference = losses["0", "none"]
    assert reference[-1] < reference[0] - 0.02, "the model must learn"
    for place in places:
        assert largest(losses[place], reference) < 1e-4, place
    return folders, {place: of_place[FIRST:] for place, of_place in losses.items()}


@pytest.mark.parametrize(
    "tuner", [pytest.param("full", marks=pytest.mark.slow), pytest.param("lora", marks=pytest.mark.faults)]
)
def test_every_placement_goes_on_to_the_last_digit(tuner: str, tmp_path: Path) -> None:
    folders, rest = write_all(tuner, 2, tmp_path)
    loading = [task(tuner, place, tmp_path, first=FIRST, load=folder) for place, folder in folders.items()]
    for place, result in zip(folders, train_engines(loading, 2, tmp_path), strict=True):
        assert result["losses"] == rest[place], place
    # 2 ranks -> 1, each from the placement before it in the list.
    pairs = list(zip(folders, [*list(folders)[1:], next(iter(folders))], strict=True))
    check_pairs(tuner, pairs, folders, rest, 1, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize(("written_on", "read_on"), [(2, 1), (1, 2)])
def test_every_placement_reads_what_every_other_wrote(
    tuner: str, written_on: int, read_on: int, tmp_path: Path
) -> None:
    folders, rest = write_all(tuner, written_on, tmp_path)
    pairs = [(a, b) for a, b in itertools.product(folders, folders) if a != b]
    check_pairs(tuner, pairs, folders, rest, read_on, tmp_path)


def check_pairs(
    tuner: str, pairs: list[Any], folders: dict[Any, str], rest: dict[Any, list[float]], ranks: int, folder: Path
) -> None:
    loading = [task(tuner, b, folder, first=FIRST, load=folders[a]) for a, b in pairs]
    for pair, result in zip(pairs, train_engines(loading, ranks, folder, timeout=900), strict=True):
        assert largest(result["losses"], rest[pair[0]]) < 1e-4, pair
