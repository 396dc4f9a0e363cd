"""``plan`` as a user runs it: JSON that is only JSON, exit codes, and a text from which nothing is
cut off and in which nothing is assumed silently.
"""

from __future__ import annotations

import json
import re

import pytest

from llmtune.cli import plan
from llmtune.cli.main import main
from llmtune.config.compose import compose_config
from llmtune.plan.resolve import resolve_plan
from llmtune.units import format_bytes
from tests.support import TINY, run_cli

REFERENCE = ["plan", "model=llama3_70b", "hardware=8xa100_80gb", "data.train=rows.jsonl"]
SMALL_CARDS = [
    "model=tiny",
    "hardware=2x3090",
    "hardware.gpu_memory_bytes=24GB",
    "hardware.host_memory_bytes=64GB",
]
LARGE = [
    "plan",
    "model=llama3_70b",
    "hardware=2x3090",
    "hardware.gpus_per_node=1",
    "hardware.host_memory_bytes=64GB",
]


@pytest.mark.process
def test_json_is_all_there_is_on_standard_output() -> None:
    done = run_cli(*REFERENCE, "--json")
    assert done.code == 0, done.err
    printed = json.loads(done.out)
    assert printed["fits"] is True
    assert printed["chosen"] == "none"
    assert printed["zero_stage"] == 3
    assert printed["model"]["parameters"] == 70_553_706_496
    assert printed["model"]["trainable_parameters"] == 207_093_760
    names = [rung["name"] for rung in printed["rungs"]]
    assert names == ["none", "optimizer_cpu", "cpu", "optimizer_nvme", "nvme"]
    chosen = printed["rungs"][0]
    device = chosen["per_gpu_bytes"]
    assert device["weights"] == pytest.approx(17.64e9, rel=1e-3)
    assert device["total"] == sum(value for name, value in device.items() if name != "total")
    keys = (
        "host_bytes",
        "nvme_bytes",
        "nvme_bytes_written_per_step",
        "checkpoint_bytes",
        "tokens_per_second",
    )
    for key in (*keys, "per_device_train_batch_size", "gradient_accumulation_steps"):
        assert chosen[key] >= 0
    assert (
        chosen["gradient_accumulation_steps"] * chosen["per_device_train_batch_size"] * 8
        == printed["global_batch_size"]
    )


@pytest.mark.process
def test_the_table_names_the_choice_and_the_reasons() -> None:
    done = run_cli(*REFERENCE, "tuner=full", "hardware.host_memory_bytes=2TB")
    assert done.code == 0, done.err
    assert "* optimizer_cpu" in done.out
    for part in (
        "does not fit; GPU memory",
        "no NVMe",
        "-> optimizer_cpu",
        "never done by itself",
        "tokens/s",
    ):
        assert part in done.out


@pytest.mark.process
def test_nothing_fits_is_exit_3_with_the_smallest_change() -> None:
    done = run_cli(*REFERENCE, "tuner=full", "hardware.host_memory_bytes=512GB", "--json")
    assert done.code == 3
    printed = json.loads(done.out)
    assert printed["fits"] is False
    assert printed["chosen"] is None
    assert "Try: offload.nvme_path" in printed["message"]


@pytest.mark.process
def test_a_wrong_key_is_exit_2() -> None:
    done = run_cli("plan", "model=tiny", "zero.deepspeed={aio:{thread_count:4}}")
    assert done.code == 2
    assert "zero.deepspeed.aio.thread_count" in done.err
    assert done.out == ""


@pytest.mark.parametrize("columns", [20, 100, 400])
def test_a_terminal_of_any_width_gets_every_letter(
    columns: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_terminal_width", lambda: columns)
    assert main(LARGE) == 3
    text = "".join(capfd.readouterr().out.split())
    needs = re.findall(r"GPUmemory:needs[\d.]+GBof[\d.]+GB", text)
    assert len(needs) == 2, text
    assert text.count("of58.9GB") == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("FOO9000", "the speed of FOO9000 is not known: 60 TFLOP/s"),
        ("4090", "did you mean hardware.gpu_name='RTX 4090'?"),
        ("RTX 4090", None),
    ],
)
def test_the_speed_of_an_unknown_card_is_said_to_be_assumed(
    name: str, said: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["plan", *SMALL_CARDS, f"hardware.gpu_name={name}", "hardware.gpus_per_node=1"]) == 0
    )
    out = capfd.readouterr().out
    assert (said or "RTX 4090") in out
    assert ("are assumed" in out) == (said is not None)
    set_speed = ["hardware.gpu_flops=1e14", f"hardware.gpu_name={name}", "hardware.gpus_per_node=1"]
    assert main(["plan", *SMALL_CARDS, *set_speed]) == 0
    assert "are assumed" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.01234, "0.0123 s"), (119.0, "119 s"), (8766.0, "2:26:06")]
)
def test_long_steps_are_told_in_hours(seconds: float, text: str) -> None:
    assert plan._describe_time(seconds) == text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["offload=none"], "placement: none as set, with ZeRO"),
        (["offload=cpu"], "placement: cpu as set, with ZeRO 3"),
        ([], "that fit"),
    ],
)
def test_what_was_set_is_not_said_to_be_chosen(overrides: list[str], said: str) -> None:
    notes = resolve_plan(compose_config([*TINY, *overrides]).config).notes
    assert said in "\n".join(notes)


@pytest.mark.parametrize("background", ["auto", "true", "false"])
def test_the_copies_of_a_checkpoint_are_said_beside_the_peak(
    background: str, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["plan", "+model=tiny", "zero=3", f"checkpoint.background={background}"]
    assert main([*given, "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    chosen = next(rung for rung in printed["rungs"] if rung["name"] == printed["chosen"])
    size = format_bytes(chosen["checkpoint_bytes"])
    assert main(given) == 0
    said = f"checkpoints: copied to {size} of host memory"
    assert (said in capfd.readouterr().out) is (background != "false")
