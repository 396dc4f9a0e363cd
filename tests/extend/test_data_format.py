"""A format of rows from a file of one's own is recognized, checked, reported and trained like any
other.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import TINY, losses, run_cli

PLUGIN = {"LLMTUNE_PLUGINS": "tests.extend.pipe_rows"}


def write(file: Path, texts: list[str]) -> Path:
    file.write_text(
        "".join(json.dumps({"pipe": text, "id": n}) + "\n" for n, text in enumerate(texts))
    )
    return file


@pytest.mark.process
def test_a_run_trains_on_it(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [f"what is {n}? | it is {n}" for n in range(30)])
    job = [
        *TINY,
        f"data.train={rows}",
        "data.val_set_size=4",
        "data.num_workers=1",
        "train.max_steps=2",
    ]
    done = run_cli(
        *job, "launch.nproc=2", "export=none", f"output_dir={tmp_path / 'run'}", env=PLUGIN
    )
    assert done.code == 0, done.err
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.process
def test_it_is_reported_and_a_bad_row_is_named(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [f"what is {n}? | it is {n}" for n in range(30)])
    given = ["data", "model=tiny", "data.val_set_size=4", f"output_dir={tmp_path / 'out'}"]
    done = run_cli(*given, f"data.train={rows}", env=PLUGIN)
    assert done.code == 0, done.err
    assert "pipe; chat template: the tokenizer's own" in done.out
    assert "[[it is " in done.out
    bad = write(tmp_path / "bad.jsonl", [*(f"a {n} | b" for n in range(20)), "a"])
    done = run_cli(*given, f"data.train={bad}", "data.format=pipe", env=PLUGIN)
    assert done.code == 4
    assert f"{bad}:21: there is no ' | ' between" in done.out
    done = run_cli(*given, f"data.train={rows}", "data.format=pip", env=PLUGIN)
    assert done.code == 2
    assert "data.format=pip: there is no such one; did you mean pipe?" in done.err
    # What a plugin made of rows is not taken from the cache without it.
    done = run_cli(*given, f"data.train={rows}")
    assert done.code == 4
    assert "cannot tell the format by the fields pipe" in done.err
