"""A run folder is read as far as it goes: what is missing is empty, what is damaged is noted."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtune.errors import CheckpointError
from llmtune.report.html import render_page
from llmtune.report.run_facts import read_run
from llmtune.report.run_page import build_run_page
from llmtune.storage.lock import hold_lock
from llmtune.storage.rank_files import FinishedRecord
from tests.report.run_folder import make_run

FILES = sorted(
    [
        *("plan.json", "config.yaml", "environment.json", "samples.json", "data_examples.json"),
        *("confusion_matrix.json", "time.json", "ended.json", "restarts.jsonl", "metrics.jsonl"),
    ]
)


def test_everything_is_read(tmp_path: Path) -> None:
    facts = read_run(make_run(tmp_path / "run"))
    assert facts.notes == ()
    assert facts.name == "plain"
    assert (facts.metrics.last_step, facts.metrics.last("loss")) == (8, 0.25)
    assert [restart.step for restart in facts.restarts] == [3]
    assert facts.record.history[0].step == 2
    assert facts.get("model.name_or_path") == "plain"
    assert facts.confusion is not None
    assert facts.confusion.counts == ((3, 1), (0, 2))
    assert facts.state == "failed"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [
        "gone",
        "cut",
        "list",
        "link",
        pytest.param("binary", marks=pytest.mark.slow),
        pytest.param("null", marks=pytest.mark.slow),
    ],
)
def test_no_file_has_to_be_there_or_whole(name: str, damage: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    file = run / name
    content = file.read_bytes()
    other = tmp_path / "elsewhere"
    other.write_bytes(content)
    file.unlink()
    if damage == "link":
        file.symlink_to(other)
    elif damage != "gone":
        damaged = {"cut": content[: len(content) // 2], "binary": b"\xff\xfe\x00" * 9}
        file.write_bytes(damaged.get(damage, b"[[1, 2]]" if damage == "list" else b"null"))
    facts = read_run(run)
    page = render_page(build_run_page(facts), "")
    assert "<h1>" in page
    if damage in ("cut", "binary", "link"):
        assert any(name in note for note in facts.notes)
        assert name in page


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 0.125}\n[1]\n{"loss": 1}\n{"step": "x"}\n{"step": 10, "lo')
    facts = read_run(run)
    assert facts.metrics.last_step == 9
    assert facts.metrics.last("loss") == 0.125
    assert facts.notes == ("metrics.jsonl: 4 damaged lines left out",)


def test_a_folder_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run folder.*runs/NAME"):
        read_run(tmp_path)


def test_the_state_follows_from_lock_and_records(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", ended=None)
    assert read_run(run).state == "failed", "killed: it left no record"
    (run / "ended.json").write_text('{"outcome": "stopped", "time": 1}')
    assert read_run(run).state == "stopped"
    FinishedRecord(step=8).write(run)
    assert read_run(run).state == "finished"
    with hold_lock(run / ".lock"):
        assert read_run(run).state == "running"
        assert read_run(run, ended=True).state == "finished"


def test_the_card_of_an_export_says_how_to_load_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "merged").mkdir()
    (run / "merged" / "README.md").write_text(
        "---\nlicense: mit\n---\n# name\n\n## Load it\n\nRun this \\*here\\*:\n\n```sh\n"
        "## a comment\nvllm serve .\n```\n\n## License\n\nnot this\n"
    )
    page = render_page(build_run_page(read_run(run)), "")
    assert "vllm serve ." in page
    assert "## a comment" in page
    assert "Run this *here*:" in page
    assert "not this" not in page
