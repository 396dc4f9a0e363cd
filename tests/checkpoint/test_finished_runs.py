"""Pruning a finished run keeps its result, what a resume needs, and everything of other runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmtune.checkpoint.finished_runs import find_removable, prune_finished
from llmtune.errors import CheckpointError
from llmtune.storage.hashing import hash_file
from llmtune.storage.lock import hold_lock
from llmtune.storage.manifest import publish, write_manifest
from llmtune.storage.rank_files import FinishedRecord


def write_folder(folder: Path, content: bytes = b"weights") -> Path:
    aside = folder.with_name(f"{folder.name}.tmp")
    aside.mkdir(parents=True)
    (aside / "model.safetensors").write_bytes(content)
    write_manifest(aside, {"model.safetensors": hash_file(aside / "model.safetensors")}, {})
    publish(aside, folder)
    return folder


def make_run(folder: Path, finished: FinishedRecord | None) -> Path:
    for step in (2, 4, 6, 8):
        write_folder(folder / f"checkpoint-{step}", b"x" * 10_000)
    write_folder(folder / "superseded-checkpoint-3")
    write_folder(folder / "adapter")
    if finished is not None:
        finished.write(folder)
    return folder


def names(run: Path) -> list[str]:
    return sorted(entry.name for entry in run.iterdir() if entry.is_dir())


FINISHED = FinishedRecord(
    step=8, published_step=4, best={"metric": "eval_loss", "value": 1.0, "step": 4}
)


def test_the_last_the_best_and_the_published_stay(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", FINISHED)
    planned = find_removable(run)
    assert names(run).count("checkpoint-2") == 1, "looking removes nothing"
    assert [item.folder.name for item in planned] == [
        *("checkpoint-2", "checkpoint-6", "superseded-checkpoint-3")
    ]
    assert prune_finished(run) == planned
    assert names(run) == ["adapter", "checkpoint-4", "checkpoint-8"]
    assert prune_finished(run) == []


def test_only_files_without_another_name_are_freed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", FINISHED)
    (before,) = [i for i in find_removable(run) if i.folder.name == "checkpoint-2"]
    os.link(run / "checkpoint-2" / "model.safetensors", tmp_path / "other-name")
    (after,) = [i for i in find_removable(run) if i.folder.name == "checkpoint-2"]
    assert before.freed_bytes - after.freed_bytes >= 10_000


def test_a_run_that_is_not_finished_or_has_no_result_is_left_alone(tmp_path: Path) -> None:
    begun = make_run(tmp_path / "begun", None)
    assert prune_finished(begun) == []
    without = make_run(tmp_path / "without", FINISHED)
    (without / "adapter" / "COMPLETE").unlink()
    assert prune_finished(without) == []
    assert len(names(begun)) == len(names(without)) == 6


def test_a_running_run_is_never_touched(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", FINISHED)
    with (
        hold_lock(run / ".lock"),
        pytest.raises(CheckpointError, match="another run is using this folder"),
    ):
        prune_finished(run)
    assert len(names(run)) == 6


def test_links_are_left_alone_and_what_they_lead_to(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", FINISHED)
    other = write_folder(tmp_path / "elsewhere" / "checkpoint-1")
    (run / "checkpoint-1").symlink_to(other)
    (run / "superseded-checkpoint-1").symlink_to(other)
    prune_finished(run)
    assert (run / "checkpoint-1").is_symlink()
    assert (other / "model.safetensors").read_bytes() == b"weights"
