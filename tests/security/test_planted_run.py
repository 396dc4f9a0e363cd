"""The whole way with 200 secrets in the environment and in the rows: a crash, the rest of the run,
an export, the data's page.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.test_secrets import SITECUSTOMIZE, find_traces, write_forms
from tests.security.planted import FORMS, plant
from tests.support import ROOT, run_cli


@pytest.mark.slow
@pytest.mark.process
def test_no_form_of_200_secrets_is_found_in_a_run_its_tracker_its_card_and_its_page(
    tmp_path: Path,
) -> None:
    planted = plant(200)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    write_forms(tmp_path / "forms", planted)
    rows = [
        {"instruction": f"Say {value}", "output": f"It is {value}."} for value in planted.values()
    ]
    rows.append({"instruction": f"nothing behind {rows[0]['instruction']}", "output": ""})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    secret = planted["P3_SECRET_ACCESS_KEY"].replace("'", "")
    command = [
        "model=tiny",
        "data.max_seq_length=256",
        "launch.nproc=2",
        "train.max_steps=4",
        "train.save_steps=1",
        "data=alpaca",
        f"data.train={tmp_path / 'rows.jsonl'}",
        "data.on_bad_row=skip",
        "train.sample_answers=true",
        *("tracker=wandb", "tracker.mode=offline", f"output_dir={folder}", "launch.max_restarts=0"),
        *("export=safetensors", f"tracker.project='{secret}'"),
    ]
    site = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "FORMS": str(tmp_path / "forms")}
    crashed = run_cli(*command, cwd=tmp_path, env={**planted, **site})
    assert crashed.code == 1, crashed.out[-2000:] + crashed.err
    assert (folder / "samples.json").is_file()
    log = (folder / "train.log").read_text()
    assert all(log.count(f"***{name}***") > len(FORMS) // 2 for name in planted)
    assert not find_traces(folder, planted)

    done = run_cli(*command, cwd=tmp_path, env=planted)
    assert done.code == 0, done.out[-2000:] + done.err
    assert (folder / "merged" / "README.md").is_file()
    assert not find_traces(folder, planted)

    page = run_cli("data", *command, cwd=tmp_path, env=planted)
    (tmp_path / "shown").mkdir()
    # What the crashed one printed begins with the environment, past llmtune.
    shown = crashed.err + done.out + done.err + page.out + page.err
    (tmp_path / "shown" / "terminal.txt").write_text(shown)
    assert not find_traces(tmp_path / "shown", planted)
    assert list(folder.glob("*.html")), page.out + page.err
    assert not find_traces(folder, planted)
