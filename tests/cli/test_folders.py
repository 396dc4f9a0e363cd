"""``report`` and ``runs``: verbs behind which folders stand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llmtune.cli.arguments import parse
from llmtune.cli.folders.columns import align
from llmtune.cli.main import main
from llmtune.cli.verbs import VERBS
from llmtune.storage import layout
from llmtune.storage.lock import hold_lock
from llmtune.storage.rank_files import FinishedRecord
from tests.checkpoint.test_finished_runs import FINISHED, write_folder
from tests.report.run_folder import make_run


@pytest.fixture(autouse=True)
def script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the real one takes seconds."""
    monkeypatch.setattr("llmtune.report.write.read_script", lambda _: "the script")


def test_folders_and_overrides_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3").mkdir()
    arguments = parse(["report", "runs/a", "lr=3", "output=x.html", "--json", "~/b"], VERBS)
    assert arguments.options.folders == ("runs/a", "lr=3", "~/b")
    assert arguments.overrides == ["report.output=x.html"]
    assert arguments.options.as_json
    # Other verbs take neither.
    assert parse(["output=x.html"], VERBS).overrides == ["output=x.html"]
    assert parse(["eval", "runs/a"], VERBS).overrides == ["runs/a"]


def test_one_run_gets_its_own_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a")
    assert main(["report", str(run)]) == 0
    assert f"page  {run}/report.html" in capfd.readouterr().out
    assert "the script" in (run / "report.html").read_text()


def test_two_runs_are_compared_as_table_page_and_json(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = make_run(tmp_path / "a"), make_run(tmp_path / "b", "other")
    assert main(["report", str(one), str(two)]) == 0
    out = capfd.readouterr().out
    assert "tokens_per_second" in out
    assert "model.name_or_path" in out
    assert (tmp_path / "compare.html").is_file()
    page = tmp_path / "x.html"
    assert main(["report", str(one), str(two), "--json", f"output={page}"]) == 0
    values = json.loads(capfd.readouterr().out)
    assert [run["name"] for run in values["runs"]] == ["plain", "other"]
    assert values["runs"][0]["loss"] == 0.25
    assert values["settings"]["model.name_or_path"] == {"plain": "plain", "other": "other"}
    assert values["page"] == str(page)
    assert "the script" in page.read_text()


def test_runs_of_one_name_are_told_apart(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("a/run", "b/run"):
        make_run(tmp_path / name)
    folders = [str(tmp_path / name) for name in ("a/run", "b/run")]
    assert main(["report", *folders, "--json"]) == 0
    values = json.loads(capfd.readouterr().out)
    assert [run["name"] for run in values["runs"]] == folders


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["report"], 2, "report needs run folders: python -m llmtune report runs/a"),
        (["report", "{a}", "{a}/"], 2, "a folder is named twice"),
        (["report", "{a}", "{none}"], 5, "no run folder"),
        (["report", "{a}", "output={none}/{none}/x"], 5, "cannot be written"),
        (["runs", "{a}", "{b}"], 2, "runs takes one folder"),
        (["runs", "{none}"], 2, "is no folder"),
        (["runs", "{a}", "runs.prune=everything"], 2, "runs.prune"),
    ],
)
def test_wrong_folders_are_refused(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    places = {name: make_run(tmp_path / name) for name in ("a", "b")}
    (tmp_path / "file").touch()
    places["none"] = tmp_path / "file" / "none"
    assert main([text.format(**places) for text in arguments]) == code
    assert message in capfd.readouterr().err


def test_runs_are_listed_and_pruned_when_asked(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done, begun = make_run(tmp_path / "done"), make_run(tmp_path / "begun")
    for run in (done, begun):
        for step in (2, 4, 8):
            write_folder(run / f"checkpoint-{step}")
        write_folder(run / "adapter")
    FINISHED.write(done)

    assert main(["runs", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert "finished" in out
    assert "8/8" in out
    assert main(["runs", str(tmp_path), "runs.prune=checkpoints", "runs.dry_run=true"]) == 0
    assert f"would remove {done / 'checkpoint-2'}" in capfd.readouterr().out
    assert (done / "checkpoint-2").is_dir()

    assert main(["runs", str(tmp_path), "runs.prune=checkpoints", "--json"]) == 0
    values = json.loads(capfd.readouterr().out)
    assert [Path(item["folder"]).name for item in values["pruned"]] == ["checkpoint-2"]
    assert {run["state"] for run in values["runs"]} == {"finished", "failed"}
    assert not (done / "checkpoint-2").exists()
    assert len(list(begun.glob("checkpoint-*"))) == 3
    assert FinishedRecord.read(done) == FINISHED


def test_the_cache_is_pruned_when_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, cache = make_run(tmp_path / "runs" / "a"), tmp_path / "cache"
    for name in ("models/old/x", "models/lately/x"):
        (cache / name).parent.mkdir(parents=True)
        (cache / name).write_text("x")
    old = cache / "models" / "old"
    for path in (old / "x", old):
        os.utime(path, (0, 0))
    cache.chmod(0o700)
    command = ["runs", str(run), "runs.prune=cache", f"paths.cache_dir={cache}"]

    # While a run trains, people may look.
    with hold_lock(run / layout.LOCK):
        assert main([*command, "runs.dry_run=true"]) == 0
        out = capfd.readouterr().out
        assert f"would remove {old}" in out
        assert "1 part: would free" in out
        assert main(command) == 2
        assert "may need what is in the cache" in capfd.readouterr().err
    assert old.is_dir()

    assert main([*command, "--json"]) == 0
    values = json.loads(capfd.readouterr().out)
    assert [item["folder"] for item in values["pruned"]] == [str(old)]
    assert not old.exists()
    assert main(command) == 0
    assert "all of the cache was used in the last 7 days" in capfd.readouterr().out
    assert (cache / "models" / "lately" / "x").is_file()
    assert main([*command, "runs.unused_days=-1"]) == 2
    assert "runs.unused_days=-1" in capfd.readouterr().err


def test_columns_are_as_wide_as_their_cells_and_long_cells_are_cut() -> None:
    lines = align(["", "one"], [["key", "1"], ["a" * 100, "2\n3"]])
    assert lines[1].index("1") == lines[2].index("2 3") > len("key")
    assert lines[2].endswith("  2 3")
    assert len(lines[2]) < 50
