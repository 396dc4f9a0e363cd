"""What a user's mistake gets: one screen with the place, the value and the next step, and the
contract's exit code.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtune.cli.arguments import parse
from llmtune.cli.main import main
from llmtune.cli.verbs import VERBS
from llmtune.errors import ConfigError
from llmtune.plan.devices.probe import fp16_supported

TINY = [
    "model=tiny",
    "data.max_seq_length=128",
    "data.val_set_size=2",
    "train.sample_answers=false",
    "train.max_steps=2",
]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(list(arguments))
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 24, "one screen"
    return code, err


def rows(path: Path, count: int = 12, **extra: str) -> str:
    path.write_text(
        "\n".join(
            json.dumps({"instruction": f"q {n}", "output": f"a {n}", **extra}) for n in range(count)
        )
    )
    return str(path)


@pytest.mark.process
def test_a_missing_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, err = refused(capsys, *TINY, "data.train=/no/such.jsonl", f"output_dir={tmp_path}/run")
    assert (code, "/no/such.jsonl: no such file" in err) == (4, True)


@pytest.mark.process
def test_a_broken_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    code, err = refused(capsys, *TINY, f"data.train={path}", f"output_dir={tmp_path}/run")
    assert (code, f"{path}:2: broken JSON" in err) == (4, True)


@pytest.mark.process
def test_a_row_without_the_field(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a"}\n')
    code, err = refused(capsys, *TINY, f"data.train={path}", f"output_dir={tmp_path}/run")
    assert (code, f"{path}:1: the field 'output' is missing" in err) == (4, True)


@pytest.mark.process
def test_a_prompt_that_is_too_long(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", input="word " * 300)
    code, err = refused(capsys, *TINY, f"data.train={path}", f"output_dir={tmp_path}/run")
    assert (code, f"{path}:" in err, "data.max_seq_length=128" in err) == (4, True, True)


def test_an_unknown_model_without_network(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, err = refused(capsys, "model.name_or_path=no-such/model", f"output_dir={tmp_path}/run")
    assert (code, "no-such/model" in err, "local folder" in err) == (7, True, True)


def test_cuda_without_cuda(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, err = refused(capsys, *TINY, "hardware.accelerator=cuda", f"output_dir={tmp_path}/run")
    assert (code, "torch sees no CUDA device" in err) == (7, True)


@pytest.mark.skipif(fp16_supported("cpu"), reason="this CPU has fp16")
def test_fp16_on_a_cpu_without_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, err = refused(capsys, *TINY, "precision=fp16", f"output_dir={tmp_path}/run")
    assert (code, "take precision=bf16" in err) == (7, True)
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, err = refused(capsys, "+model=llama3_70b", "+zero=3", f"output_dir={tmp_path}/run")
    assert (code, "does not fit" in err, "Try: " in err) == (3, True, True)


@pytest.mark.process
def test_a_folder_that_is_no_run_is_not_touched(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    code, err = refused(capsys, *TINY, f"output_dir={tmp_path}")
    assert (code, "is not empty and not a run folder" in err) == (5, True)
    assert {p.name for p in tmp_path.iterdir()} <= {"thesis.txt", ".lock"}


def test_unknown_verbs_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "trian")[1] == "error: unknown verb 'trian': did you mean 'train'?\n"
    assert refused(capsys, "--gpus=8")[0] == 2
    code, err = refused(capsys, "modle=tiny")
    assert (code, "did you mean 'model'?" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["export"], 2, "export needs run=FOLDER"),
        (["chat", "run=/no/run"], 5, "is no run or checkpoint of llmtune"),
        (["eval", "checkpoint=/no/run"], 5, "not a complete checkpoint"),
        (["chat", "run=a", "base=b"], 2, "run= and base= exclude each other"),
        (["chat", "run=a", "adapter=b"], 2, "adapter= goes with base="),
        (
            ["chat", "adapter=b", "chat.prompt=x"],
            2,
            "adapter=b needs its base model: add base=MODEL",
        ),
        (
            ["-m", "tuner.lora_r=8,16"],
            2,
            "-m: a command is one run, and sweep is the verb for many",
        ),
        (["train", "model=tiny", "--multirun"], 2, "--multirun: a command is one run"),
        (["--config-dir", "/no/such"], 2, "--config-dir /no/such: no such folder"),
        (["--cfg", "hydra"], 2, "only 'job' is known"),
    ],
)
def test_verbs_name_what_is_missing(
    arguments: list[str], code: int, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, err = refused(capsys, *arguments)
    assert (found, part in err) == (code, True), err


@pytest.mark.process
def test_debug_trace_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code = main([*TINY, "data.train=/no/such.jsonl", f"output_dir={tmp_path}/run", "debug=trace"])
    assert code == 4
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("form", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"]])
def test_the_launchers_local_rank_is_taken_off(form: list[str]) -> None:
    assert parse(["train", *form, "zero=3"], VERBS).overrides == ["zero=3"]
    first = parse([*form, "plan", "zero=3"], VERBS)
    assert (first.verb, first.overrides) == ("plan", ["zero=3"])


def test_help_and_version_say_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in ("train", "export", "merge", "eval", "predict", "chat"))
    assert main(["--version"]) == 0


def test_cfg_job_prints_what_was_composed(capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    assert main(["--cfg", "job", "+model=llama3_8b", "train.max_steps=3"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["train"]["max_steps"] == 3
    assert config["model"]["config"]["hidden_size"] == 4096


def test_an_option_needs_its_value() -> None:
    with pytest.raises(ConfigError):
        parse(["--cfg"], VERBS)
