"""Which checkpoints stay; and that none is ever half-gone."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from llmtune.checkpoint.find import find_checkpoints, restore_checkpoints, sweep_incomplete
from llmtune.checkpoint.result import link_result
from llmtune.checkpoint.retention import Retention, list_checkpoints, prune_checkpoints
from llmtune.config.best_model import BestModel
from llmtune.storage.atomic import REPLACED
from llmtune.storage.hashing import hash_file
from llmtune.storage.manifest import find_damage, mark_complete, write_manifest


def make(run: Path, step: int, **metrics: float) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "x").write_text(str(step))
    write_manifest(folder, {"x": hash_file(folder / "x")}, {"step": step, "metrics": metrics})
    mark_complete(folder)
    return folder


def best_by(metric: str, greater_is_better: bool = False) -> BestModel:
    return BestModel(
        metric=metric, greater_is_better=greater_is_better, is_saved=True, load_at_end=False
    )


def left(run: Path) -> list[int]:
    return [int(folder.name.split("-")[1]) for folder in find_checkpoints(run)]


@pytest.mark.parametrize(
    ("retention", "stay"),
    [
        (Retention(), [5, 10, 15, 20, 25]),
        (Retention(limit=2), [20, 25]),
        (Retention(limit=1, every=10), [10, 20, 25]),
        (Retention(limit=2, best=best_by("eval_loss")), [10, 20, 25]),
        (Retention(limit=1, best=best_by("accuracy", greater_is_better=True)), [15, 25]),
        (Retention(limit=1, best=best_by("accuracy")), [5, 25]),
        (Retention(limit=1, best=best_by("nothing")), [25]),
    ],
)
def test_the_newest_the_best_and_every_so_many_stay(
    retention: Retention, stay: list[int], tmp_path: Path
) -> None:
    # 10 and 25 are equally good: the older is the best.
    values = {5: (3.0, 0.1), 10: (1.0, 0.2), 15: (2.0, 0.9), 20: (2.5, 0.3), 25: (1.0, 0.9)}
    for step, (loss, accuracy) in values.items():
        make(tmp_path, step, eval_loss=loss, accuracy=accuracy)
    prune_checkpoints(tmp_path, retention)
    assert left(tmp_path) == stay


@pytest.mark.parametrize("seed", range(12))
def test_the_best_of_all_evaluations_is_there_at_every_moment(seed: int, tmp_path: Path) -> None:
    draws = random.Random(seed)
    greater = bool(seed % 2)
    rule = best_by("eval_loss", greater_is_better=greater)
    retention = Retention(limit=draws.choice((1, 2, 3)), best=rule)
    best: tuple[float, int] | None = None
    for step in range(1, 16):
        # Few values, so that some are equal; what is no number is never the best.
        value = draws.choice((1.0, 2.0, 3.0, 4.0, float("nan")))
        evaluated = draws.random() < 0.7
        make(tmp_path, step, **({"eval_loss": value} if evaluated else {}))
        worth = -value if greater else value
        if evaluated and not math.isnan(value) and (best is None or worth < best[0]):
            best = (worth, step)
        prune_checkpoints(tmp_path, retention)
        if best is not None:
            assert best[1] in left(tmp_path)
        # A full disk takes no best one either.
        prune_checkpoints(tmp_path, retention, limit=0)
        assert {step, best[1] if best is not None else step} == set(left(tmp_path))


def test_a_full_disk_takes_older_ones_but_never_the_last_nor_what_is_being_copied(
    tmp_path: Path,
) -> None:
    folders = {step: make(tmp_path, step) for step in (1, 2, 3)}
    (tmp_path / "checkpoint-4").mkdir()
    assert prune_checkpoints(tmp_path, Retention(), busy={folders[1]}, limit=0) == ["checkpoint-2"]
    assert left(tmp_path) == [1, 3]
    assert [kept.step for kept in list_checkpoints(tmp_path)] == [1, 3]


def test_what_a_cut_off_save_left_is_swept_and_what_it_was_to_replace_comes_back(
    tmp_path: Path,
) -> None:
    good = make(tmp_path, 5)
    (tmp_path / "checkpoint-6.tmp").mkdir()
    (tmp_path / "checkpoint-7").mkdir()
    old = good.rename(tmp_path / f"checkpoint-5{REPLACED}")
    (tmp_path / "checkpoint-5").mkdir()
    assert find_checkpoints(tmp_path) == []
    assert sweep_incomplete(tmp_path) == ["checkpoint-6.tmp", "checkpoint-7"]
    assert left(tmp_path) == [5]
    assert not old.exists()
    # The replacement was finished, and only the removal of the old one was not.
    new: Any = (tmp_path / "checkpoint-5").rename(tmp_path / f"checkpoint-5{REPLACED}")
    make(tmp_path, 5, eval_loss=1.0)
    restore_checkpoints(tmp_path)
    assert new.exists()
    assert sweep_incomplete(tmp_path) == [new.name]
    assert list_checkpoints(tmp_path)[0].metrics == {"eval_loss": 1.0}


@pytest.mark.parametrize("name", ["adapter", "model"])
def test_a_result_whose_replacement_was_cut_off_comes_back(tmp_path: Path, name: str) -> None:
    checkpoint = make(tmp_path, 5)
    result = tmp_path / name
    link_result(checkpoint, result)
    old = result.rename(tmp_path / f"{name}{REPLACED}")
    (tmp_path / f"{name}.tmp").mkdir()
    restore_checkpoints(tmp_path)
    assert find_damage(result) == []
    assert not old.exists()
    assert sweep_incomplete(tmp_path) == [f"{name}.tmp"]
    link_result(checkpoint, result)
    assert {path.name for path in tmp_path.iterdir()} == {name, checkpoint.name}
