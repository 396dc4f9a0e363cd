"""The ``data`` verb, and training on packed and streamed rows, as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmtune.cli.main import main
from tests.support import TINY, losses, run_cli


def write(path: Path, count: int, start: int = 0) -> str:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {number}?"},
                {"role": "assistant", "content": f"It is {number}. " * (number % 4 + 1)},
            ]
        }
        for number in range(start, start + count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def report(*arguments: str, code: int = 0) -> dict[str, Any]:
    done = run_cli("data", "--json", "model=tiny", *arguments)
    assert done.code == code, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


@pytest.mark.process
def test_the_report_counts_what_will_be_trained(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", 100)
    found = report(
        f"data.train={source}",
        "data.val_set_size=10",
        "data.packing=true",
        "data.max_seq_length=512",
    )
    assert set(found) >= {
        "rows",
        "tokens",
        "supervised_tokens",
        "dropped",
        "truncated",
        "packing_efficiency",
        "problems",
        "lengths",
    }
    assert (found["rows"], found["eval"]["rows"], found["problems"]) == (90, 10, [])
    assert 0.8 < found["packing_efficiency"] <= 1
    assert 0 < found["supervised_tokens"] < found["tokens"] == round(found["lengths"]["mean"] * 90)
    assert sum(found["lengths"]["rows"]) == 90
    assert found["padding"]["packed"] == pytest.approx(1 - found["packing_efficiency"])
    assert (
        found["padding"]["grouped"] < found["padding"]["random"] < found["padding"]["to_max_length"]
    )


@pytest.mark.process
def test_problems_are_listed_with_file_and_line_and_the_exit_code_of_data(tmp_path: Path) -> None:
    source = Path(write(tmp_path / "a.jsonl", 20))
    source.write_text(source.read_text() + '{"messages": []}\n{"mess\n')
    given = [f"data.train={source}", "data.val_set_size=5"]
    found = report(*given, code=4)
    assert [(problem["file"], problem["line"]) for problem in found["problems"]] == [
        (str(source), 21),
        (str(source), 22),
    ]
    assert found["refused"]
    skipped = report(*given, "data.on_bad_row=skip")
    assert (len(skipped["problems"]), skipped["refused"], skipped["skipped"], skipped["rows"]) == (
        2,
        False,
        2,
        15,
    )


def test_a_person_sees_numbers_lengths_and_masks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.jsonl", 40)
    code = main(
        [
            "data",
            "model=tiny",
            f"data.train={source}",
            "data.val_set_size=4",
            f"output_dir={tmp_path}/out",
        ]
    )
    out = capfd.readouterr().out
    assert code == 0
    assert "supervised" in out
    assert re.search(r"\[\[(It is \d+\. )+<\|im_end\|>\]\]", out)
    assert "#####" in out
    assert (tmp_path / "out/lengths.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "out/data.html").read_text()
    assert re.search(r"<span class=\"t\">(It is \d+\. )+&lt;\|im_end\|&gt;</span>", page)
    assert "data:image/png;base64,iVBOR" in page


def test_rows_that_are_not_those_of_the_task_are_refused_as_in_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"text": "a {n}", "label": "{"xy"[n % 2]}"}}\n' for n in range(8))
    )
    given = [
        "data",
        "model=tiny_bert",
        f"data.train={tmp_path}/a.jsonl",
        "data.val_set_size=0",
        f"output_dir={tmp_path}/out",
    ]
    assert main([*given, "model.task=token_classification"]) == 2
    assert "model.task=token_classification: the rows" in capfd.readouterr().err
    assert main(given) == 0


ROWS: dict[str, dict[str, object]] = {
    "messages": {
        "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    },
    "alpaca": {"instruction": "Say so.", "output": "So."},
    "prompt_completion": {"prompt": "Why?", "completion": " So."},
    "text": {"text": "So it is."},
}


@pytest.mark.parametrize(
    ("kind", "overrides", "expected"),
    [
        ("messages", [], "messages; chat template: the tokenizer's own"),
        (
            "alpaca",
            ["data.chat_template=chatml"],
            "alpaca; chat template: data.chat_template=chatml",
        ),
        ("prompt_completion", [], "prompt_completion, without a chat template"),
        ("text", ["data.format=text"], "text, without a chat template"),
    ],
)
def test_what_the_rows_are_read_as_is_said(
    kind: str,
    overrides: list[str],
    expected: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(ROWS[kind]) + "\n" for _ in range(3)))
    given = [
        "data",
        "model=tiny",
        f"data.train={source}",
        "data.val_set_size=0",
        f"output_dir={tmp_path}/out",
        *overrides,
    ]
    # The second time all of it comes from the cache.
    for _ in range(2):
        assert main(given) == 0
        (line,) = (
            line
            for line in capfd.readouterr().out.splitlines()
            if line.strip().startswith("read as")
        )
        assert line.split("read as")[1].strip() == expected
    assert main([*given, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["formats"] == [kind]


def test_fields_that_nobody_reads_are_listed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = Path(write(tmp_path / "a.jsonl", 20))
    rows = [
        {**json.loads(line), "mood": "good", "id": 1} for line in source.read_text().splitlines()
    ]
    source.write_text("\n".join(map(json.dumps, rows)))
    given = ["data", "model=tiny", f"data.train={source}", f"output_dir={tmp_path}/out"]
    assert main(given) == 0
    (line,) = (line for line in capfd.readouterr().out.splitlines() if "not read" in line)
    assert line.split()[2:] == ["mood"]
    assert main([*given, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["unknown_fields"] == ["mood"]


@pytest.mark.process
def test_classification_rows_can_be_looked_at(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    source.write_text(
        "text,label\n"
        + "".join(f"words {number},{'pos' if number % 2 else 'neg'}\n" for number in range(30))
    )
    found = report("data=classification", f"data.train={source}")
    assert found["labels"] == ["neg", "pos"]


@pytest.mark.process
def test_a_program_gets_a_report_even_where_no_row_is_left(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"messages": []}\n')
    found = report(f"data.train={source}", "data.on_bad_row=skip", code=4)
    assert (found["rows"], found["refused"]) == (0, True)
    assert f"{source}:1" in found["problems"][0]["message"]


@pytest.mark.process
def test_bad_rows_of_a_run_are_listed_in_its_folder(tmp_path: Path) -> None:
    source = Path(write(tmp_path / "a.jsonl", 20))
    source.write_text(source.read_text() + '{"messages": []}\n')
    given = [
        *TINY,
        f"data.train={source}",
        "data.val_set_size=0",
        "train.max_steps=1",
        "export=none",
    ]
    given += [f"output_dir={tmp_path}/run", "train.global_batch_size=2"]
    refused = run_cli(*given)
    assert refused.code == 4
    assert f"{source}:21: 'messages' must be a list" in refused.err
    done = run_cli(*given, "data.on_bad_row=skip")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run/bad_rows.jsonl").read_text())["line"] == 21


@pytest.mark.process
def test_a_streamed_run_that_is_made_longer_goes_on_with_the_next_rows(tmp_path: Path) -> None:
    source, held_out = write(tmp_path / "a.jsonl", 300), write(tmp_path / "b.jsonl", 8, start=1000)
    given = [
        *TINY,
        f"data.train={source}",
        f"data.eval={held_out}",
        "data.packing=true",
        "train.global_batch_size=4",
    ]
    given += ["schedule.lr_scheduler_type=constant", "precision=fp32", "export=none", "zero=1"]
    given += ["data.streaming=true", "data.shuffle_buffer=100", "data.dataloader_num_workers=1"]
    whole = run_cli(*given, "train.max_steps=6", "launch.nproc=2", f"output_dir={tmp_path}/whole")
    assert whole.code == 0, whole.err
    for steps, ranks in ((3, 2), (6, 1)):
        part = run_cli(
            *given,
            f"train.max_steps={steps}",
            f"launch.nproc={ranks}",
            f"output_dir={tmp_path}/parts",
        )
        assert part.code == 0, part.err
    straight, resumed = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert len(straight) == len(resumed) == 6
    assert straight[:3] == resumed[:3]
    # One rank adds the same numbers in another order.
    assert straight[3:] == pytest.approx(resumed[3:], abs=1e-4)
    assert len(set(straight)) == 6


@pytest.mark.process
def test_packed_rows_give_the_loss_of_the_same_rows_unpacked(tmp_path: Path) -> None:
    """One step over all rows: the same tokens, the same denominator, the same gradient."""
    source = write(tmp_path / "a.jsonl", 12)
    given = [
        *TINY,
        f"data.train={source}",
        "data.val_set_size=0",
        "precision=fp32",
        "export=none",
        "train.max_steps=1",
    ]
    records = {}
    for packing, rows in (("false", 12), ("true", 2)):
        folder = tmp_path / packing
        done = run_cli(
            *given,
            f"data.packing={packing}",
            f"train.global_batch_size={rows}",
            f"output_dir={folder}",
        )
        assert done.code == 0, done.err
        (records[packing],) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        assert json.loads((folder / "plan.json").read_text())["data"]["train"]["rows"] == rows
    assert records["true"]["tokens"] == records["false"]["tokens"]
    assert records["true"]["loss"] == pytest.approx(records["false"]["loss"], abs=1e-6)
    assert records["true"]["grad_norm"] == pytest.approx(records["false"]["grad_norm"], rel=1e-5)
