"""The ladder on the reference machine: what fits, what is chosen, why the others lost, and where a
fallback goes.
"""

from __future__ import annotations

import pytest

from llmtune.config.compose import compose_config
from llmtune.plan.advice import describe_misfit, list_advice
from llmtune.plan.ladder import Ladder, Rung, next_candidate
from llmtune.plan.memory.placement import RUNGS
from llmtune.plan.resolve import resolve_ladder
from tests.support import first

REFERENCE = ["model=llama3_70b", "hardware=8xa100_80gb", "data.train=rows.jsonl"]
FULL = [*REFERENCE, "tuner=full"]


def plan(*overrides: str) -> Ladder:
    return resolve_ladder(compose_config(list(overrides)).config, planning=True)


def rung(ladder: Ladder, name: str) -> Rung:
    return next(found for found in ladder.rungs if found.name == name)


def chosen(ladder: Ladder) -> str | None:
    return ladder.chosen.placement.rung if ladder.chosen else None


def test_lora_on_the_reference_machine_needs_no_offload() -> None:
    ladder = plan(*REFERENCE)
    assert chosen(ladder) == "none"
    assert ladder.chosen is not None
    assert ladder.chosen.placement.zero_stage == 3
    device = ladder.chosen.memory.device
    assert device.weights == pytest.approx(17.64e9, rel=1e-3)
    assert device.adapters == pytest.approx(2 * 207_093_760 / 8, rel=1e-3)
    assert device.total == sum(getattr(device, name) for name in device.__dataclass_fields__)
    assert "pointless" in rung(ladder, "optimizer_nvme").reason
    assert ladder.activations_origin == "traced"


def test_full_fine_tuning_goes_where_there_is_room() -> None:
    assert chosen(plan(*FULL, "hardware.host_memory_bytes=2TB")) == "optimizer_cpu"
    nvme = plan(*FULL, "hardware.host_memory_bytes=512GB", "hardware.nvme_bytes=4TB")
    assert chosen(nvme) in ("optimizer_nvme", "nvme")
    written = rung(nvme, "optimizer_nvme").candidate
    assert written is not None
    assert written.memory.nvme_written_per_step * 8 == pytest.approx(16 * 70.55e9, rel=0.01)
    neither = plan(*FULL)
    assert chosen(neither) is None
    assert "GPU memory" in rung(neither, "none").reason
    assert "host memory" in rung(neither, "optimizer_cpu").reason
    assert "no NVMe" in rung(neither, "nvme").reason


def test_published_failures_are_foreseen() -> None:
    """axolotl #1439: 1 TB of host memory is too little; LLaMA-Factory #7282: 8 x 141 GB are too
    little at 16 B/parameter.
    """
    assert not any(found.candidate and found.candidate.fits for found in plan(*FULL).rungs)
    h200 = plan(*FULL, "hardware=1xh200", "hardware.gpus_per_node=8", "offload=none")
    assert chosen(h200) is None


def test_an_explicit_choice_is_obeyed_or_refused_with_what_would_do() -> None:
    ladder = plan(*REFERENCE, "offload=cpu")
    assert chosen(ladder) == "cpu"
    assert "offload=cpu was asked for" in rung(ladder, "none").reason
    config = compose_config([*FULL, "hardware.host_memory_bytes=2TB", "offload=none"]).config
    refused = resolve_ladder(config, planning=True)
    assert refused.chosen is None
    assert "Try: offload=auto" in describe_misfit(config, refused)


def test_the_smallest_change_that_fits_is_tried_before_it_is_named() -> None:
    config = compose_config(FULL).config
    assert "Try: offload.nvme_path=/path on a drive with" in describe_misfit(
        config, resolve_ladder(config, planning=True)
    )


def test_what_changes_the_arithmetic_is_advice_only() -> None:
    config = compose_config([*FULL, "hardware.host_memory_bytes=2TB"]).config
    advice = list_advice(config, resolve_ladder(config, planning=True))
    assert [item.saves_bytes for item in advice] == sorted(
        (item.saves_bytes for item in advice), reverse=True
    )
    changes = {item.change: item for item in advice}
    bf16 = next(item for change, item in changes.items() if "in bf16" in change)
    # Half of master weight, moments and gradient.
    assert bf16.saves_bytes == pytest.approx(8 * 70.55e9 / 8, rel=0.01)
    assert bf16.override == "optim=adamw_bf16"
    assert changes["AdamW in 8 bits instead of AdamW"].override == "optim=adamw_8bit"
    assert bf16.where == "host"
    assert changes["train adapters only"].override == "tuner=lora"
    lion = changes["Lion instead of AdamW"]
    assert lion.saves_bytes == pytest.approx(4 * 70.55e9 / 8, rel=0.01)
    assert lion.override == "optim=lion"
    with_lion = compose_config([*FULL, "hardware.host_memory_bytes=2TB", "optim=lion"]).config
    of_lion = {
        item.change: item
        for item in list_advice(with_lion, resolve_ladder(with_lion, planning=True))
    }
    assert "AdamW instead of Lion" not in of_lion
    in_bf16 = of_lion["AdamW in bf16 instead of Lion"]
    assert in_bf16.saves_bytes == pytest.approx(4 * 70.55e9 / 8, rel=0.01)


@pytest.mark.parametrize(
    ("optimizer", "length", "rung"),
    [
        (["adamw_bf16"], 512, "none"),
        (["adamw_bf16", "optim.rounding=kahan"], 512, "optimizer_cpu"),
        (["adamw_bf16"], 2048, "optimizer_cpu"),
        (["adamw_8bit"], 512, "none"),
        (["adamw_8bit"], 2048, "none"),
    ],
)
def test_low_precision_states_bring_full_70b_into_eight_gpus(
    optimizer: list[str], length: int, rung: str
) -> None:
    ladder = plan(*FULL, f"optim={optimizer[0]}", *optimizer[1:], f"data.max_seq_length={length}")
    assert chosen(ladder) == rung
    on_device = next(found.candidate for found in ladder.rungs if found.name == "none")
    assert on_device is not None
    # Weights that are their own master weights, gradients, and moments.
    of_moments = {"adamw_bf16": 4 + 2 * (len(optimizer) > 1), "adamw_8bit": 2 + 2 * 4 / 256}
    device = on_device.memory.device
    states = device.weights + device.gradients + device.optimizer
    each = 4 + of_moments[optimizer[0]]
    assert states == pytest.approx(each * 70_553_706_496 / 8, rel=1e-3)
    if rung != "none":
        assert "GPU memory: needs" in (on_device.lacks or "")


def test_adamw_goes_to_nvme_there_and_without_it_is_told_what_would_fit() -> None:
    with_drives = plan(*FULL, "hardware.host_memory_bytes=1.1TB", "hardware.nvme_bytes=4TB")
    assert chosen(with_drives) == "optimizer_nvme"
    config = compose_config(FULL).config
    ladder = resolve_ladder(config, planning=True)
    assert ladder.chosen is None
    offered = {item.override for item in list_advice(config, ladder)}
    assert {"optim=adamw_bf16", "optim=adamw_8bit", "tuner=lora"} <= offered
    with_drives_at_hand = compose_config(
        [*FULL, "hardware.nvme_bytes=100GB", "data.max_seq_length=256"]
    ).config
    assert "Try: optim=adamw_bf16" in describe_misfit(
        with_drives_at_hand, resolve_ladder(with_drives_at_hand, planning=True)
    )


@pytest.mark.parametrize("kind", ["adamw_bf16", "adamw_8bit"])
def test_rungs_that_an_optimizer_cannot_use_are_refused_with_the_reason(kind: str) -> None:
    ladder = plan(
        "model=smollm2_135m",
        "tuner=full",
        f"optim={kind}",
        "hardware=laptop",
        "hardware.nvme_bytes=1TB",
        "data.train=rows.jsonl",
    )
    assert {c.placement.zero_stage for c in ladder.candidates} == {1, 2, 3}
    for name in ("optimizer_nvme", "nvme"):
        found = rung(ladder, name)
        assert found.candidate is None
        assert "on NVMe: DeepSpeed swaps" in found.reason


def test_more_machines_help() -> None:
    sixteen = plan(*FULL, "hardware=16xa100_80gb", "train.global_batch_size=16")
    sixtyfour = plan(*FULL, "hardware=64xa100_80gb", "train.global_batch_size=64")
    assert sixteen.world_size == 16
    assert chosen(sixtyfour) == "none"
    assert sixtyfour.chosen is not None
    assert sixteen.chosen is not None
    assert sixtyfour.chosen.speed.tokens_per_second > 3 * sixteen.chosen.speed.tokens_per_second


def test_a_fallback_goes_where_less_of_that_memory_is_needed() -> None:
    ladder = plan(
        "model=smollm2_135m",
        "tuner=full",
        "hardware=2x3090",
        "hardware.nvme_bytes=1TB",
        "data.train=a.jsonl",
    )
    first = ladder.chosen
    assert first is not None
    tried, names = [first], []
    candidate = next_candidate(ladder, first, tried, "step", "device")
    while candidate is not None:
        assert candidate.memory.device.total < tried[-1].memory.device.total
        names.append(candidate.placement.rung)
        tried.append(candidate)
        candidate = next_candidate(ladder, candidate, tried, "step", "device")
    assert names
    assert set(names) <= set(RUNGS)
    activations = next_candidate(ladder, first, [first], "forward", "device")
    assert activations is not None
    assert activations.memory.device.total < first.memory.device.total


def test_on_a_cpu_only_nvme_is_below_for_states() -> None:
    """Device and host are one pool."""
    ladder = plan(
        "model=smollm2_135m",
        "tuner=full",
        "hardware=laptop",
        "hardware.nvme_bytes=1TB",
        "data.max_seq_length=256",
    )
    assert ladder.chosen is not None
    below = next_candidate(ladder, ladder.chosen, [ladder.chosen], "step", "host")
    assert below is not None
    assert below.placement.uses_nvme


@pytest.mark.parametrize(
    "name",
    first(
        3, ["8xa100_80gb", "laptop", "2x3090", "8xa100_40gb", "8xh100", "1xh200", "16xa100_80gb"]
    ),
)
def test_every_named_machine_runs_a_small_model(name: str) -> None:
    ladder = plan("model=smollm2_135m", f"hardware={name}", "train.global_batch_size=16")
    assert ladder.chosen is not None
    assert ladder.chosen.speed.tokens_per_second > 0
