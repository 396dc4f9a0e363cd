"""A run that trains, and one that fails, leave a report."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from tests.support import TINY, run_cli

JOB = [
    *TINY,
    *("data.train=stdlib_docs@24", "data.val_set_size=4", "train.global_batch_size=4"),
    *("launch.nproc=1", "export=none", "report.write=true"),
]


@pytest.fixture
def script(cache: Path) -> None:
    """Making the real script takes seconds; any text is one."""
    import altair

    version = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    folder = cache / "report"
    folder.mkdir(exist_ok=True)
    name = f"vega-{metadata.version('vl-convert-python')}-{version}.js"
    (folder / name).write_text("the script that draws")


@pytest.mark.process
@pytest.mark.usefixtures("script")
def test_a_run_and_one_that_cannot_go_on_leave_a_report(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = run_cli("train", *JOB, "train.max_steps=2", f"output_dir={run}")
    assert done.code == 0, done.err
    assert f"report:       {run}/report.html" in done.out
    page = (run / "report.html").read_text()
    assert "the script that draws" in page
    assert ">finished</span>" in page
    assert json.loads((run / "ended.json").read_text())["outcome"] == "finished"
    examples = json.loads((run / "data_examples.json").read_text())
    assert sum(examples["lengths"]["rows"]) == examples["lengths"]["count"] == 20
    for row in examples["rows"]:
        trained = [text for text, is_trained in row["pieces"] if is_trained]
        given = [text for text, is_trained in row["pieces"] if not is_trained]
        assert trained
        assert any("Python's standard library" in text for text in given)

    # More steps, and a model that has gone: the ranks fail.
    plan = json.loads((run / "plan.json").read_text())
    assert plan["steps"]["total_steps"] == 2
    failed = run_cli(
        "train",
        *JOB,
        "train.max_steps=4",
        "launch.max_restarts=0",
        "launch.memory_limit=200MB",
        f"output_dir={run}",
    )
    assert failed.code != 0
    end = json.loads((run / "ended.json").read_text())
    assert end["outcome"] == "failed"
    assert end["message"]
    page = (run / "report.html").read_text()
    assert ">failed</span>" in page
    assert end["message"].split()[0] in page
