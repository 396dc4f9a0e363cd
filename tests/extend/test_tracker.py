"""A tracker from a file of one's own sees every record of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.extend.test_export_format import JOB
from tests.support import run_cli


@pytest.mark.process
@pytest.mark.slow
def test_a_run_is_written_down(tmp_path: Path) -> None:
    (tmp_path / "conf/tracker").mkdir(parents=True)
    (tmp_path / "conf/tracker/notebook.yaml").write_text("kind: notebook\nproject: mine\n")
    places = [
        f"--config-dir={tmp_path / 'conf'}",
        f"output_dir={tmp_path / 'run'}",
        "run_name=first",
        "export=none",
    ]
    done = run_cli(
        *JOB, "tracker=notebook", *places, env={"LLMTUNE_PLUGINS": "tests.extend.notebook_tracker"}
    )
    assert done.code == 0, done.err
    assert "the notebook is open" in done.out + done.err
    lines = (tmp_path / "run/notebook.txt").read_text().splitlines()
    assert lines[0] == "begins first of project mine, seed 42"
    assert any(line.startswith("step 1: ") and "loss" in line for line in lines)
    assert any("eval_loss" in line for line in lines)
    assert lines[-1] == "ends: finished"


def test_one_that_is_not_there_is_refused_before_anything_begins(tmp_path: Path) -> None:
    from llmtune.cli.main import main

    assert main([*JOB, "tracker.kind=wandbb", f"output_dir={tmp_path}/run"]) == 2
    assert not (tmp_path / "run").exists()
