"""The start as a user's: nothing is imported before, and what takes long is done while something
else waits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llmtune.config.compose import compose_config
from llmtune.plan.resolve import resolve_ladder
from tests.support import TINY, losses, run

#: Tells what stood when the ranks were started, and what the supervisor has left of their variables
#: afterwards.
_PROGRAM = """
import os, sys
from llmtune.cli import main
from llmtune.plan import resolve as planner
from llmtune.run import ranks_ahead
def spy(module, name, what):
    real = getattr(module, name)
    def call(*arguments, **named):
        made = real(*arguments, **named)
        print(what, "torch" in sys.modules, flush=True)
        return made
    setattr(module, name, call)
spy(ranks_ahead, "RankGroup", "ranks are started; torch:")
spy(planner, "resolve_ladder", "the plan is made; torch:")
code = main.main()
print("threads left:", os.environ.get("OMP_NUM_THREADS"), os.environ.get("TOKENIZERS_PARALLELISM"), flush=True)
sys.exit(code)
"""  # noqa: E501
JOB = [
    *TINY,
    "data.train=stdlib_docs@50",
    "data.val_set_size=4",
    "train.max_steps=2",
    "export=none",
    "launch.nproc=2",
]


@pytest.mark.process
@pytest.mark.usefixtures("started_cold")
def test_a_run_that_starts_cold_trains_and_its_ranks_do_not_wait_for_torch(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.delenv(name, raising=False)
    # A second start of this model: its shape is remembered.
    resolve_ladder(compose_config(JOB).config)
    done = run([sys.executable, "-c", _PROGRAM, *JOB, f"output_dir={tmp_path}/run"])
    assert done.code == 0, done.out + done.err
    told = [line for line in done.out.splitlines() if "; torch:" in line]
    assert told == [
        "the plan is made; torch: False",
        "ranks are started; torch: False",
    ], "the supervisor plans without it"
    assert "threads left: None None" in done.out, "what ranks are given is theirs alone"
    assert len(losses(tmp_path / "run")) == 2
    versions = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert versions, "written by a process that had not imported the libraries"
