"""``plan`` as a user runs it: the issue's reference machine, JSON that is only JSON, exit codes."""

from __future__ import annotations

import json

import pytest

from tests.support import run_cli

REFERENCE = ["plan", "model=llama3_70b", "hardware=8xa100_80gb", "data.train=rows.jsonl"]


@pytest.mark.process
def test_json_is_all_there_is_on_standard_output() -> None:
    done = run_cli(*REFERENCE, "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert plan["fits"] is True
    assert plan["chosen"] == "none"
    assert plan["zero_stage"] == 3
    assert plan["model"]["parameters"] == 70_553_706_496
    assert plan["model"]["trainable_parameters"] == 207_093_760
    names = [rung["name"] for rung in plan["rungs"]]
    assert names == ["none", "optimizer_cpu", "cpu", "optimizer_nvme", "nvme"]
    chosen = plan["rungs"][0]
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
        == plan["global_batch_size"]
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
    plan = json.loads(done.out)
    assert plan["fits"] is False
    assert plan["chosen"] is None
    assert "Try: offload.nvme_path" in plan["message"]


@pytest.mark.process
def test_a_wrong_key_is_exit_2() -> None:
    done = run_cli("plan", "model=tiny", "zero.deepspeed={aio:{thread_count:4}}")
    assert done.code == 2
    assert "zero.deepspeed.aio.thread_count" in done.err
    assert done.out == ""
