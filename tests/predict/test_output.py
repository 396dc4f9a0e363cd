"""Rows of the output, and which output is written over: none but the command's own."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from llmtune.cli.main import main
from llmtune.config.compose import compose_config
from llmtune.errors import ConfigError
from llmtune.plan.devices.gpus import Gpu
from llmtune.predict import processes
from llmtune.predict.output_row import make_output_row, write_line
from llmtune.predict.predictor import split_batches
from llmtune.predict.processes import count_processes
from llmtune.run.target import Target
from tests.predict.models import make_bert, read_rows, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("model"), "Sequence", ["no", "yes"])


def command(model: Path, rows: Path, out: Path | str, *more: str) -> list[str]:
    return [
        *("predict", f"base={model}", f"predict.input={rows}", f"predict.output={out}"),
        *("precision=fp32", "data.max_seq_length=48", *more),
    ]


@pytest.mark.parametrize(
    ("fields", "key", "kept"),
    [
        ({"a": 1}, "prediction", {"a": 1}),
        ({"text": "x", "row": 7}, "prediction", {"text": "x", "input_row": 7}),
        ({"text": "x", "prediction": 1}, "text", {"input_text": "x", "prediction": 1}),
        (
            {"row": 1, "input_row": 2, "error": 3},
            "text",
            {"input_input_row": 1, "input_row": 2, "input_error": 3},
        ),
    ],
)
def test_fields_of_the_input_are_kept(
    fields: dict[str, Any], key: str, kept: dict[str, Any]
) -> None:
    row = make_output_row(fields, 4, None, {key: "p"}, key)
    assert row == {**kept, "row": 4, key: "p"}
    failed = make_output_row(fields, 4, "why", {}, key)
    assert failed == {**kept, "row": 4, key: None, "error": "why"}


def test_a_line_is_json_whatever_the_input_held() -> None:
    row = {"a": float("nan"), "b": datetime.date(2024, 1, 2), "c": b"x", "d": [{"e": "\ud800"}]}
    line = write_line({**row, "f": "é\u2028\x9b"})
    assert "\n" not in line[:-1]
    assert "\x9b" not in line
    assert json.loads(line.encode()) == {
        "a": None,
        "b": "2024-01-02",
        "c": "x",
        "d": [{"e": "\ud800"}],
        "f": "é\u2028\x9b",
    }


def test_batches_hold_rows_of_like_length() -> None:
    assert split_batches([3, 9, 1, 9], 2, 0) == [[1, 3], [0, 2]]
    assert split_batches([], "auto", 5) == []
    lengths = [(7 * number) % 900 + 1 for number in range(500)]
    batches = split_batches(lengths, "auto", 100)
    assert sorted(row for batch in batches for row in batch) == list(range(500))
    assert max(map(len, batches)) == 32
    assert all(len(b) == 1 or len(b) * (lengths[b[0]] + 100) <= 8192 for b in batches)
    assert split_batches([50_000], "auto", 0) == [[0]]


def test_the_output_of_another_command_is_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"text": "the cat"}, {"text": "a dog"}])
    out = tmp_path / "new" / "out.jsonl"
    assert main(command(model, rows, out, "--json")) == 0
    summary = json.loads(capsys.readouterr().out)
    assert {key: summary[key] for key in ("rows", "predicted", "output", "cut")} == {
        "rows": 2,
        "predicted": 2,
        "output": str(out),
        "cut": 0,
    }
    assert summary["rows_per_second"] > 0
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]
    written = out.read_bytes()

    # The same command has nothing to do; any other one is refused.
    assert main(command(model, rows, out)) == 0
    assert "the output is finished: 2 rows" in capsys.readouterr().out
    assert main(command(model, rows, out, "predict.top_k=1")) == 2
    assert "exists, and is not the output of this command" in capsys.readouterr().err
    assert out.read_bytes() == written
    out.write_text("mine\n")
    assert main(command(model, rows, out)) == 2
    assert out.read_text() == "mine\n"


def test_the_folder_of_another_command_is_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"text": "the cat"}])
    out = tmp_path / "out.jsonl"
    parts = tmp_path / "out.jsonl.parts"
    parts.mkdir()
    (parts / "thesis.txt").write_text("precious")
    assert main(command(model, rows, out)) == 5
    assert "is something else" in capsys.readouterr().err
    assert [path.name for path in parts.iterdir()] == ["thesis.txt"]
    (parts / "thesis.txt").unlink()
    (parts / "job.json").write_text('{"job": "another"}')
    counts = {"rows": 1, "windows": 1, "skipped": 0, "truncated": 0}
    (parts / "prepared.json").write_text(json.dumps(counts))
    assert main(command(model, rows, out)) == 5
    assert "holds the results of another prediction" in capsys.readouterr().err
    assert not out.exists()


def test_each_gpu_that_holds_the_model_gets_a_process(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_config([f"model.name_or_path={model}", "launch.nproc=null"]).config
    target = Target(config=config, model_folder=model, adapter=None, run=None, base_name="bert")
    assert count_processes(target, 10) == 1
    monkeypatch.setattr(processes, "resolve_accelerator", lambda _: "cuda")
    for memory_bytes, expected in ((10**9, 4), (10_000, 1)):
        gpus = [Gpu("card", memory_bytes, 80)] * 4
        monkeypatch.setattr(processes, "visible_gpus", lambda gpus=gpus: gpus)
        assert count_processes(target, 10) == expected
    assert count_processes(target, 1) == 1
    for count, works in ((3, True), (5, False)):
        config.launch.nproc = count
        if works:
            assert count_processes(target, 10) == count
        else:
            with pytest.raises(ConfigError, match="there are 4 GPUs"):
                count_processes(target, 10)


def test_rows_are_printed_without_an_output(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"text": "the cat"}, {"text": "a dog"}])
    out = tmp_path / "out.jsonl"
    assert main(command(model, rows, out)) == 0
    capfd.readouterr()
    assert main(command(model, rows, "-")) == 0
    printed = capfd.readouterr()
    assert [json.loads(line) for line in printed.out.splitlines()] == read_rows(out)
    assert "2 rows predicted" in printed.err
    assert main(command(model, rows, "null", "--json")) == 2


@pytest.mark.parametrize(
    ("overrides", "code", "part"),
    [
        ([], 2, "predict needs rows: add predict.input=FILE"),
        (["predict.input=/no/such.jsonl"], 4, "/no/such.jsonl: no such file"),
        (["predict.input=a.jsonl@5"], 2, "limit=5 of a.jsonl: every row is predicted once"),
        (["predict.top_p=0"], 2, "predict.top_p=0.0: a share above 0"),
        (["predict.batch_size=0"], 2, "predict.batch_size=0: must be above 0"),
        (["predict.output="], 2, "predict.output= is empty"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    overrides: list[str], code: int, part: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", f"base={model}", *overrides]) == code
    assert part in capsys.readouterr().err
