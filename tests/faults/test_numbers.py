"""A row whose loss is not a number: the run ends, leaves the step out, or goes back, as it was
told.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtune.storage.rank_files import RestartRecord
from tests.faults.harness import BASE, SAVE_STEPS, STEPS, Run, Table, judge_folder, read_lines

pytestmark = pytest.mark.process

#: In one row only, and in no other as a part of a token.
RARE = "¿"
#: Drawn in step 9; the last eight rows are in none of the 24 steps.
BAD_LINE, LINES = 50, 200


@pytest.fixture(scope="module")
def poisoned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a model that knows no number for one token, which stands in one row of the
    data.
    """
    folder = tmp_path_factory.mktemp("poisoned")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (token,) = tokenizer(RARE, add_special_tokens=False)["input_ids"][-1:]
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    head = model.get_input_embeddings().weight.detach().clone()
    model.config.tie_word_embeddings = False
    # Otherwise the logit of this token would be NaN everywhere.
    model.lm_head.weight = torch.nn.Parameter(head)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = math.nan
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(1, LINES + 1):
            question = f"What is {number} times 7?" + (f" {RARE}" if number == BAD_LINE else "")
            turns = [("user", question), ("assistant", f"It is {number * 7}.")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return [f"model.name_or_path={folder}/model", f"data.train={folder}/rows.jsonl"]


def run_poisoned(tmp_path: Path, poisoned: list[str], on_nan: str) -> Run:
    """Such a run; nothing is held out, so that the row is trained on."""
    base = [
        text
        for text in BASE
        if not text.startswith(("model=", "data.train=", "data.val_set_size=", "train.eval"))
    ]
    return Run(
        tmp_path, [*poisoned, "zero=2", "data.val_set_size=0", f"train.on_nan={on_nan}"], base
    )


def bad_step(run: Run) -> int:
    """The step that was left out, which has a line like the others and changed nothing."""
    lines = [json.loads(text) for text in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    (skipped,) = [line["step"] for line in lines if line.get("skipped")]
    assert all(math.isfinite(line["loss"]) for line in lines if line["step"] != skipped)
    return int(skipped)


@pytest.mark.slow
def test_it_stops_at_the_row_and_goes_on_without_its_step(
    poisoned: list[str], table: Table, tmp_path: Path
) -> None:
    run = run_poisoned(tmp_path, poisoned, "stop")
    with table.trial("NaN in a batch, train.on_nan=stop", "then skip", run) as trial:
        run.start()
        code = run.end()
        assert code == 1, (code, run.console)
        assert f"rows.jsonl:{BAD_LINE}" in run.console, run.console
        newest = max(int(name.rpartition("-")[2]) for name in run.complete())
        done = max(read_lines(run.path)[0])
        assert newest == done, "the state from before the bad step is saved"
        trial.orphans += run.count_orphans()
        run.overrides[-1] = "train.on_nan=skip"
        run.finish()
        assert run.resumed_step() == newest
        assert bad_step(run) == newest + 1
        trial.orphans += run.count_orphans()
        trial.wrong += judge_folder(run)
        trial.resumed = True


def test_skipping_and_going_back_come_to_the_same_numbers(
    poisoned: list[str], table: Table, tmp_path: Path
) -> None:
    runs = {
        on_nan: run_poisoned(tmp_path / on_nan, poisoned, on_nan) for on_nan in ("skip", "rollback")
    }
    # A save in the background may still be on its way when the bad step comes.
    runs["rollback"].overrides.insert(0, "checkpoint.background=false")
    with table.trial(
        "NaN in a batch, train.on_nan=skip and rollback", "both", *runs.values()
    ) as trial:
        for run in runs.values():
            run.finish()
            trial.orphans += run.count_orphans()
            trial.wrong += judge_folder(run)
            assert f"rows.jsonl:{BAD_LINE}" in run.console, run.console
        skipped = bad_step(runs["skip"])
        assert bad_step(runs["rollback"]) == skipped
        (restart,) = RestartRecord.read_all(runs["rollback"].path)
        assert restart.rollback
        trial.lost_steps = skipped - 1 - runs["rollback"].resumed_step()
        assert trial.lost_steps <= SAVE_STEPS
        if read_lines(runs["skip"].path)[0] != read_lines(runs["rollback"].path)[0]:
            trial.wrong.append("skip and rollback differ")
        trial.resumed = True
