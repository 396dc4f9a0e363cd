"""The whole job as a user starts it, on the tiny model: 1 and 2 ranks, launchers, interruption,
export, eval, chat.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import ROOT, first, losses, run, run_cli

pytestmark = pytest.mark.process

BASE = [
    "model=tiny",
    "data.train=stdlib_docs@200",
    "data.val_set_size=16",
    "precision=fp32",
    "optim.learning_rate=2e-3",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run of 20 steps on 2 ranks under ZeRO 3."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    command = [
        *BASE,
        "zero=3",
        "launch.nproc=2",
        "train.max_steps=20",
        "train.save_steps=5",
        "train.eval_steps=10",
    ]
    done = run_cli(*command, f"output_dir={folder}")
    assert done.code == 0, done.err + done.out
    for part in (
        "parameters",
        "8 rows = ",
        "2 ranks",
        "held-out loss",
        "step 20/20",
        "Held-out prompts",
        "merged model",
    ):
        assert part in done.out, done.out
    assert "Warning" not in done.out + done.err, "libraries belong into train.log"
    return folder


def test_the_run_folder_is_that_of_the_contract(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.yaml",
        "overrides.yaml",
        "plan.json",
        "environment.json",
        "metrics.jsonl",
        "train.log",
        "loss.png",
        *("samples.json", "checkpoint-15", "checkpoint-20", "adapter", "merged"),
    }
    assert "checkpoint-10" not in names, "save_total_limit is 2"
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 21))
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 10, 20]
    for key in ("loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "seconds"):
        assert all(key in r for r in records if "loss" in r)
    evaluations = [r["eval_loss"] for r in records if "eval_loss" in r]
    assert evaluations[-1] < evaluations[0]
    checkpoint = {path.name for path in (finished / "checkpoint-20").iterdir()}
    assert checkpoint >= {
        "COMPLETE",
        "manifest.json",
        "adapter_model.safetensors",
        "trainer_state.json",
    }


def test_plain_peft_and_plain_transformers_load_the_result(finished: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(finished / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(finished / "merged")
    settings = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(
        settings["base_model_name_or_path"], dtype=torch.float32
    )
    adapted = PeftModel.from_pretrained(base, finished / "adapter")
    assert any(p.abs().sum() > 0 for name, p in adapted.named_parameters() if "lora_B" in name)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    # The base is stored in bf16, so the merged weights are rounded to it once.
    assert (merged(ids).logits - adapted(ids).logits).abs().max() < 0.05
    assert (finished / "merged" / "README.md").read_text().count("llmtune") >= 1


def test_the_same_command_again_says_that_it_is_finished(finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_text()
    done = run_cli(
        *BASE,
        "zero=3",
        "launch.nproc=2",
        "train.max_steps=20",
        "train.save_steps=5",
        f"output_dir={finished}",
    )
    assert done.code == 0
    assert "finished:" in done.out
    assert (finished / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_after_training_any_format_is_written_and_sent(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    command = [
        *BASE,
        "zero=3",
        "launch.nproc=2",
        "train.max_steps=20",
        "train.save_steps=5",
        f"output_dir={tmp_path / 'run'}",
    ]
    for kind, file in (("gguf", "model-f16.gguf"), ("adapter", "adapter_model.safetensors")):
        sent = tmp_path / f"sent-{kind}"
        done = run_cli(*command, f"export={kind}", f"export.upload=file://{sent}")
        assert done.code == 0, done.err + done.out
        folder = tmp_path / "run" / f"export-{kind}"
        assert f"exported {kind}: {folder}" in done.out
        assert (sent / file).read_bytes() == (folder / file).read_bytes()
        assert (tmp_path / "run" / "merged" / "model.safetensors").is_file(), (
            "the merged model stays"
        )
        if kind == "gguf":
            other = run_cli(*command, "export=gguf", "export.gguf_type=q8_0")
            assert other.code == 0, other.err + other.out
            assert (folder / "model-q8_0.gguf").is_file(), "a changed option is heeded"
            assert run_cli(*command, "export=gguf").code == 0
        (sent / "COMPLETE").unlink()
        again = run_cli(*command, f"export={kind}", f"export.upload=file://{sent}")
        assert again.code == 0, again.err + again.out
        assert (sent / "COMPLETE").is_file(), "an upload that was cut off is finished"
        assert run_cli("verify", f"base={sent}").code == 0


def test_another_configuration_is_refused_with_the_differences(finished: Path) -> None:
    command = [*BASE, "train.max_steps=20", f"output_dir={finished}"]
    done = run_cli(*command, "tuner.lora_r=4", "precision=bf16")
    assert done.code == 5
    assert "tuner.lora_r: 16 there, 4 now" in done.err
    assert "precision: fp32 there, bf16 now" in done.err
    assert run_cli(*BASE, "train.max_steps=10", f"output_dir={finished}").code == 5
    none = run_cli(*command, "resume_from_checkpoint=none")
    assert (none.code, "resume_from_checkpoint=none" in none.err) == (5, True)


@pytest.mark.parametrize("name", first(1, ["deepspeed", "torchrun"]))
def test_launchers_give_the_same_losses(name: str, finished: Path, tmp_path: Path) -> None:
    tools = Path(sys.executable).parent
    launcher = {
        "deepspeed": [
            str(tools / "deepspeed"),
            "--num_accelerators",
            "2",
            "--master_port",
            "29877",
        ],
        "torchrun": [str(tools / "torchrun"), "--nproc_per_node", "2", "--master_port", "29878"],
    }[name]
    arguments = [*BASE, "zero=3", "train.max_steps=20", "train.sample_answers=false", "export=none"]
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    folder = tmp_path / name
    done = run([*launcher, "scripts/train.py", *arguments, f"output_dir={folder}"], env=env)
    assert done.code == 0, done.out[-2000:] + done.err[-2000:]
    assert losses(folder) == losses(finished)
    assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{launcher[-1]}_*"))


@pytest.mark.slow
def test_a_launched_rank_reports_a_bad_file_once_and_none_hangs(tmp_path: Path) -> None:
    tools = Path(sys.executable).parent
    command = [
        str(tools / "torchrun"),
        "--nproc_per_node",
        "2",
        "--master_port",
        "29879",
        "scripts/train.py",
    ]
    done = run(
        [*command, *BASE, "data.train=/no/such.jsonl", f"output_dir={tmp_path}/r"], timeout=120
    )
    assert done.code != 0
    assert "/no/such.jsonl: no such file" in done.out + done.err


def test_a_killed_run_goes_on_and_equals_the_undisturbed_one(
    finished: Path, tmp_path: Path
) -> None:
    """Killed after step 10 on 2 ranks; continued once on 2 ranks (identical) and once on 1
    (1e-4).
    """
    folder = tmp_path / "killed"
    command = [
        *BASE,
        "zero=3",
        "train.max_steps=20",
        "train.save_steps=5",
        "export=none",
        "train.sample_answers=false",
    ]
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "llmtune", *command, "launch.nproc=2", f"output_dir={folder}"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-10" / "COMPLETE").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    supervisor.kill()
    supervisor.wait()
    assert not (folder / "finished.json").exists(), "it was killed in time"
    subprocess.run(["cp", "-r", str(folder), str(tmp_path / "moved")], check=True)
    done = run_cli(*command, "launch.nproc=2", f"output_dir={folder}")
    assert done.code == 0, done.err
    assert "resuming" in done.out
    assert losses(folder) == losses(finished)
    done = run_cli(*command, "launch.nproc=1", f"output_dir={tmp_path / 'moved'}")
    assert done.code == 0, done.err
    differences = [
        abs(a - b) for a, b in zip(losses(tmp_path / "moved"), losses(finished), strict=True)
    ]
    assert max(differences) < 1e-4


def test_a_signal_saves_and_the_same_command_goes_on(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    command = [
        *BASE,
        "zero=3",
        "launch.nproc=2",
        "train.max_steps=20",
        "train.save_steps=100",
        "export=none",
    ]
    command += ["train.sample_answers=false", f"output_dir={folder}"]
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "llmtune", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    metrics = folder / "metrics.jsonl"
    while time.monotonic() < deadline and not (
        metrics.is_file() and '"loss"' in metrics.read_text()
    ):
        time.sleep(0.01)
    supervisor.send_signal(signal.SIGINT)
    out, err = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 75, out + err
    assert "the same command resumes from there" in err
    assert run_cli(*command).code == 0
    assert losses(folder) == losses(finished)


@pytest.mark.slow
def test_a_longer_run_goes_on_and_says_so(tmp_path: Path) -> None:
    command = [*BASE, "train.sample_answers=false", "export=none", f"output_dir={tmp_path / 'r'}"]
    assert run_cli(*command, "train.max_steps=3").code == 0
    done = run_cli(*command, "train.max_steps=5", "zero=2")
    assert done.code == 0, done.err
    assert "longer than before: 3 -> 5 steps" in done.out
    assert len(losses(tmp_path / "r")) == 5


@pytest.mark.slow
def test_a_named_checkpoint_is_gone_on_from_and_later_ones_are_set_aside(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    command = [
        *BASE,
        "zero=3",
        "launch.nproc=2",
        "train.max_steps=20",
        "export=none",
        "train.sample_answers=false",
    ]
    wanted = f"resume_from_checkpoint={folder}/checkpoint-15"
    (folder / "finished.json").unlink()
    done = run_cli(*command, wanted, f"output_dir={folder}")
    assert done.code == 0, done.err
    assert "checkpoint-20 does not follow from" in done.out
    assert losses(folder) == losses(finished)
    other = run_cli(*command, wanted, "seed=7", f"output_dir={tmp_path / 'other'}")
    assert (other.code, "seed: 42 there, 7 now" in other.err) == (5, True)


def test_eval_and_chat_work_on_a_run_a_checkpoint_and_an_export(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    trained = records[-1]["eval_loss"]
    data = ["data.train=stdlib_docs@200", "data.val_set_size=16", "precision=fp32"]
    for target in (
        [f"run={finished}"],
        [f"checkpoint={finished}/checkpoint-20"],
        [f"base={finished}/merged", *data],
    ):
        done = run_cli("eval", "--json", *target)
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert found["eval_loss"] == pytest.approx(trained, abs=2e-3), target
        assert "warning" not in found, "the rows are those that the run held out"
    chat = run_cli(
        "chat", f"run={finished}", "chat.prompt=What is a list, and why?", "chat.max_new_tokens=5"
    )
    assert (chat.code, chat.err) == (0, "")
    talk = run(
        [
            sys.executable,
            "-m",
            "llmtune",
            "chat",
            f"base={finished}/merged",
            "chat.max_new_tokens=5",
        ],
        stdin="Hi\nAgain\n",
    )
    assert talk.code == 0, talk.err


def test_export_writes_a_checkpoint_where_it_is_told(finished: Path, tmp_path: Path) -> None:
    done = run_cli("merge", f"checkpoint={finished}/checkpoint-15", f"output_dir={tmp_path}/out")
    assert done.code == 0, done.err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 64
    settings = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    base = settings["base_model_name_or_path"]
    done = run_cli(
        "export", f"base={base}", f"adapter={finished}/adapter", f"output_dir={tmp_path}/own"
    )
    assert done.code == 0, done.err
    merged = AutoModelForCausalLM.from_pretrained(finished / "merged")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert all(
        torch.equal(a, b) for a, b in zip(merged.parameters(), own.parameters(), strict=True)
    )


def test_full_fine_tuning_ends_in_a_model_that_transformers_loads(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    done = run_cli(
        "model=tiny",
        "tuner=full",
        "zero=3",
        "launch.nproc=2",
        "train.max_steps=4",
        "data.train=stdlib_docs@200",
        "optim.learning_rate=2e-3",
        "train.sample_answers=false",
        "export.max_shard_bytes=100000",
        f"output_dir={folder}",
    )
    assert done.code == 0, done.err + done.out
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert len(list((folder / "model").glob("model-*.safetensors"))) > 1
    evaluated = run_cli("eval", "--json", f"run={folder}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert json.loads(evaluated.out)["eval_loss"] == pytest.approx(
        records[-1]["eval_loss"], abs=5e-3
    )
    assert model.config.tie_word_embeddings
