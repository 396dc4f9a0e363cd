"""Run folders are found and described without changing anything in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmtune.errors import ConfigError
from llmtune.report.run_list import find_runs, list_runs, measure
from llmtune.storage.lock import hold_lock
from llmtune.storage.rank_files import EndRecord, FinishedRecord
from tests.report.run_folder import make_run


def test_runs_are_found_at_all_levels_and_nothing_else_is(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a")
    trial = make_run(tmp_path / "sweep" / "trial-1")
    (first / "checkpoint-4").mkdir()
    make_run(first / "inner")
    (tmp_path / "other").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    assert find_runs(tmp_path) == [first, trial]
    assert find_runs(first) == [first]
    assert find_runs(tmp_path / "other") == []
    with pytest.raises(ConfigError, match="no folder"):
        find_runs(tmp_path / "nowhere")


def test_a_run_is_described_by_its_newest_lines(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", ended=None)
    (entry,) = list_runs(tmp_path)
    assert (entry.name, entry.state, entry.step, entry.total_steps) == ("plain", "failed", 8, 8)
    assert (entry.loss, entry.eval_loss) == (0.25, 0.25)
    EndRecord(outcome="stopped", time=1.0, message="a signal").write(run)
    (entry,) = list_runs(tmp_path)
    assert (entry.state, entry.message) == ("stopped", "a signal")
    FinishedRecord(step=8).write(run)
    assert list_runs(tmp_path)[0].state == "finished"
    with hold_lock(run / ".lock"):
        assert list_runs(tmp_path)[0].state == "running"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\ufffd"])
def test_damaged_files_hide_no_run(text: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    for name in ("plan.json", "metrics.jsonl", "ended.json", "finished.json"):
        (run / name).write_text(text)
    (entry,) = list_runs(tmp_path)
    assert (entry.name, entry.step, entry.loss) == ("a", 0, None)


def test_a_file_with_two_names_counts_once_and_links_do_not(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "one").write_bytes(b"x" * 1_000_000)
    once = measure(folder)
    os.link(folder / "one", folder / "two")
    (tmp_path / "large").write_bytes(b"x" * 5_000_000)
    (folder / "link").symlink_to(tmp_path / "large")
    assert 900_000 < once <= measure(folder) < once + 10_000
