"""A run that goes on from an adapter begins where ``eval`` sees that adapter, whatever the
placement.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.support import first, run_cli

pytestmark = pytest.mark.process

DATA = ["data.train=stdlib_docs@120", "data.val_set_size=12", "precision=fp32"]
RUN = [
    "model=tiny",
    *DATA,
    "train.eval_max_rows=null",
    "train.sample_answers=false",
    "export=none",
    "train.logging_steps=1",
]


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with another scale and another rank for some modules, by which a wrong one shows
    at once.
    """
    folder = tmp_path_factory.mktemp("adapter") / "home"
    torch.manual_seed(0)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=r".*\.(q_proj|up_proj|down_proj)",
        rank_pattern={"up_proj": 2},
        alpha_pattern={"q_proj": 400, "0.mlp.down_proj": 100},
    )
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), settings
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(str(folder / "trained"))
    return folder / "trained"


@pytest.fixture(scope="module")
def evaluated(adapter: Path, tiny_model: Path, nursery: None) -> float:
    """The held-out loss of that adapter, as ``eval`` has it."""
    done = run_cli(
        "eval", "--json", f"base={tiny_model}", f"adapter={adapter}", "data=stdlib_docs", *DATA
    )
    assert done.code == 0, done.err
    assert json.loads(done.out)["data"] == "rows held out of stdlib_docs@120"
    bare = run_cli("eval", "--json", f"base={tiny_model}", "data=stdlib_docs", *DATA)
    found = float(json.loads(done.out)["eval_loss"])
    assert abs(found - json.loads(bare.out)["eval_loss"]) > 0.001
    return found


def held_out(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["eval_loss"] for record in lines if "eval_loss" in record]


@pytest.mark.parametrize(
    "placement", first(1, [["zero=3", "launch.nproc=2"], ["zero=0"]]), ids=["ZeRO 3", "ZeRO 0"]
)
def test_step_0_is_what_eval_says(
    placement: list[str], adapter: Path, evaluated: float, tmp_path: Path
) -> None:
    home = {"HOME": str(adapter.parent)}
    command = [*RUN, *placement, f"output_dir={tmp_path}/run", "tuner.adapter_path=~/trained"]
    done = run_cli(*command, "train.max_steps=1", env=home)
    assert done.code == 0, done.err + done.out
    assert held_out(tmp_path / "run")[0] == pytest.approx(evaluated, abs=2e-6)
    assert "another alpha for 0.mlp.down_proj (100), q_proj (400)" in " ".join(done.out.split())
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["rank_pattern"] == {"up_proj": 2}
    assert settings["alpha_pattern"] == {"q_proj": 400, "0.mlp.down_proj": 100}


def test_a_run_that_has_begun_needs_the_adapter_no_more(adapter: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    command = [
        *RUN,
        f"output_dir={tmp_path}/run",
        f"tuner.adapter_path={copy}",
        "schedule=constant",
    ]
    first = run_cli(*command, "train.max_steps=1")
    assert first.code == 0, first.err + first.out
    shutil.rmtree(copy)
    second = run_cli(*command, "train.max_steps=2")
    assert second.code == 0, second.err + second.out
    fresh = run_cli(*command, f"output_dir={tmp_path}/fresh", "train.max_steps=1")
    assert (fresh.code, "no adapter here" in fresh.err) == (5, True)


def test_eval_refuses_an_adapter_of_another_model(
    adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """peft loads what matches, and says nothing of the rest."""
    shutil.copytree(adapter, tmp_path / "other")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["target_modules"] = r".*\.(q_proj|up_proj|down_proj|o_proj)"
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps(settings))
    done = run_cli(
        "eval", f"base={tiny_model}", f"adapter={tmp_path}/other", "data=stdlib_docs", *DATA
    )
    assert (done.code, "is another model's: 4 of the matrices" in done.err) == (5, True), done.err
