"""What a plan makes of a machine, with what torch and NVIDIA's library say of it mocked."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from llmtune.config.compose import compose_config
from llmtune.doctor.software import inspect_cuda
from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.launch.launchers.environment import set_allocator_default, set_defaults
from llmtune.launch.preflight.affinity import bind_to_gpu
from llmtune.plan.devices import gpus
from llmtune.plan.devices.cards import CARDS, find_card
from llmtune.plan.devices.hardware import Hardware
from llmtune.plan.devices.probe import probe_host_memory_bytes, resolve_hardware
from llmtune.plan.memory import peak_memory
from llmtune.plan.memory.memory_plan import MemoryPlan
from llmtune.plan.plan import Plan
from llmtune.plan.resolve import resolve_ladder, resolve_plan
from llmtune.storage.plain_fields import from_plain

GIB = 2**30
EXPERIMENT = ["experiment=llama3_70b_lora_8xa100", "data.train=x.jsonl"]
KERNELS = {
    "cu130": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"],
    "cu126": ["sm_50", "sm_60", "sm_70"],
}


ALL = 2**64 - 1
NODES = [[ALL, 2**32 - 1, 0], [0, ALL - (2**32 - 1), ALL]]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this machine and of the suite."""
    for name in ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES", *gpus.ALLOCATOR_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(total=900 * GIB, available=800 * GIB)
    )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give this machine GPUs that torch sees."""

    def have(count: int, name: str, gib: float, capability: int, built: str = "cu130") -> None:
        properties = SimpleNamespace(
            name=name, total_memory=int(gib * GIB), major=capability // 10, minor=capability % 10
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: KERNELS[built])

    return have


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give this machine a driver, with NVML's Python module in front of it."""

    def have(version: str, count: int, nvlink_of: set[Any] | None = None) -> None:
        nvml = ModuleType("pynvml")
        nvml.NVMLError = RuntimeError  # type: ignore[attr-defined]
        nvml.NVML_NVLINK_MAX_LINKS = 2  # type: ignore[attr-defined]
        answers: dict[str, Any] = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetCount": lambda: count,
            "nvmlSystemGetDriverVersion": lambda: version,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
            # Even GPUs hang on the first socket, odd ones on the second, of two times 96 cores.
            "nvmlDeviceGetCpuAffinity": lambda handle, words: NODES[int(handle) % 2][:words],
            "nvmlDeviceGetNvLinkState": lambda handle, _: handle in (nvlink_of or set()),
        }
        for name, answer in answers.items():
            setattr(nvml, name, answer)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)

    return have


def probe(*overrides: str, **more: Any) -> Hardware:
    return resolve_hardware(compose_config(["model=tiny", *overrides]).config.hardware, **more)


@pytest.mark.parametrize("version", ["470.256.02", "535.104.05", "550.54.15", "570.86.10"])
@pytest.mark.parametrize("built", ["13.0", None])
def test_gpus_that_torch_cannot_use_are_no_reason_to_train_on_the_cpu(
    version: str, built: str | None, machine: Any, driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(0, "", 0, 0)
    driver(version, 8)
    monkeypatch.setattr(torch.version, "cuda", built)
    with pytest.raises(MissingPrerequisiteError) as caught:
        probe()
    assert caught.value.exit_code == 7
    for part in (
        "8 NVIDIA GPUs",
        version,
        torch.__version__,
        built or "CPUs only",
        "scripts/setup.sh",
    ):
        assert part in str(caught.value)
    assert probe("hardware.accelerator=cpu").accelerator == "cpu", "who asks for it gets it"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert probe().accelerator == "cpu"


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_gpus_that_were_hidden_on_purpose_are_left_alone(
    visible: str, machine: Any, driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(0, "", 0, 0)
    driver("580.65.06", 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert probe().accelerator == "cpu"


def test_a_machine_without_gpus_is_one(machine: Any, driver: Any) -> None:
    machine(0, "", 0, 0)
    driver("580.65.06", 0)
    assert probe().accelerator == "cpu"


@pytest.mark.parametrize(
    ("count", "name", "gib", "capability", "card"),
    [
        (8, "NVIDIA A100-SXM4-80GB", 79.15, 80, "A100-80GB"),
        (4, "NVIDIA A100-SXM4-40GB", 39.4, 80, "A100-40GB"),
        (1, "NVIDIA A100-PCIE-40GB", 39.4, 80, "A100-40GB"),
        (8, "NVIDIA H100 80GB HBM3", 79.1, 90, "H100"),
        (2, "NVIDIA H100 NVL", 93.1, 90, "H100 NVL"),
        (2, "NVIDIA H100 PCIe", 79.2, 90, "H100 PCIE"),
        (8, "NVIDIA H200", 139.8, 90, "H200"),
        (8, "NVIDIA H20", 95.6, 90, "H20"),
        (8, "NVIDIA B200", 178.3, 100, "B200"),
        (1, "NVIDIA L4", 22.0, 89, "L4"),
        (1, "NVIDIA L40", 44.4, 89, "L40"),
        (1, "NVIDIA L40S", 44.4, 89, "L40S"),
        (2, "NVIDIA GeForce RTX 3090", 23.7, 86, "RTX 3090"),
        (1, "Tesla T4", 14.6, 75, "T4"),
    ],
)
def test_cards_are_told_by_their_names(
    count: int, name: str, gib: float, capability: int, card: str, machine: Any, driver: Any
) -> None:
    machine(count, name, gib, capability)
    driver("580.65.06", count, {0})
    found = probe()
    assert find_card(name, int(gib * GIB)) is CARDS[card]
    assert (found.device_count, found.flops, found.fp32_flops) == (
        count,
        CARDS[card].flops,
        CARDS[card].fp32_flops,
    )
    assert found.compute_capability == capability == CARDS[card].compute_capability
    assert found.device_memory_bytes == int(gib * GIB)


def test_a_slice_of_a_card_has_a_share_of_its_speed() -> None:
    whole, slice_ = (
        find_card("NVIDIA A100-SXM4-80GB"),
        find_card("NVIDIA A100-SXM4-80GB MIG 2g.20gb", 20 * GIB),
    )
    assert whole is not None
    assert slice_ is not None
    assert slice_.flops == pytest.approx(whole.flops * 2 / 7)
    assert find_card("NVIDIA A30 MIG 1g.6gb").flops == pytest.approx(CARDS["A30"].flops / 4)  # type: ignore[union-attr]
    assert find_card("NVIDIA L400") is None


def test_named_hardware_is_not_trusted_over_the_machine(machine: Any, driver: Any) -> None:
    """An experiment for 80-GB cards and 1 TiB of memory, on 40-GB cards and 512 GiB."""
    machine(8, "NVIDIA A100-SXM4-40GB", 39.4, 80)
    driver("580.65.06", 8, {0})
    found = resolve_hardware(compose_config(EXPERIMENT).config.hardware)
    assert (found.device_memory_bytes, found.host_memory_bytes) == (int(39.4 * GIB), 900 * GIB)
    assert any("hardware.gpu_memory_bytes=80GiB" in note for note in found.notes)
    assert any("hardware.gpu_name=A100-80GB" in note for note in found.notes) is False, (
        "an A100 all the same"
    )
    planned = resolve_hardware(compose_config(EXPERIMENT).config.hardware, planning=True)
    assert (planned.device_memory_bytes, planned.notes) == (80 * GIB, ()), (
        "a plan may be for another machine"
    )


def test_what_was_named_as_less_is_kept_and_data_sheets_round_up(machine: Any, driver: Any) -> None:
    machine(8, "NVIDIA A100-SXM4-80GB", 79.15, 80)
    driver("580.65.06", 8, {0})
    assert probe("hardware.gpu_memory_bytes=20GiB").device_memory_bytes == 20 * GIB
    found = probe("hardware.gpu_memory_bytes=80GiB")
    assert (found.device_memory_bytes, found.notes) == (int(79.15 * GIB), ())
    (note,) = probe("hardware.gpu_name=H100").notes
    assert "hardware.gpu_name=H100: this machine has NVIDIA A100-SXM4-80GB" in note


def test_notes_are_in_the_plan_and_survive_its_file(machine: Any, driver: Any) -> None:
    machine(1, "NVIDIA A100-SXM4-40GB", 39.4, 80)
    driver("580.65.06", 1)
    plan = resolve_plan(compose_config(["model=tiny", "hardware.gpu_memory_bytes=80GiB"]).config)
    assert plan.notes[0].startswith("hardware.gpu_memory_bytes=80GiB: this machine has ")
    again = from_plain(Plan, json.loads(json.dumps(asdict(plan))))
    assert (again.notes, again.hardware) == (plan.notes, plan.hardware)


def test_tasks_of_slurm_that_see_one_gpu_each_are_as_many_as_were_named(
    machine: Any, driver: Any
) -> None:
    machine(1, "NVIDIA A100-SXM4-80GB", 79.15, 80)
    driver("580.65.06", 8, {0})
    config = compose_config(EXPERIMENT).config.hardware
    with pytest.raises(MissingPrerequisiteError, match=r"gpus_per_node=8: this machine has 1 GPU"):
        resolve_hardware(config)
    assert resolve_hardware(config, ranks_on_node=8).device_count == 8
    plan = resolve_plan(compose_config(["model=tiny", "hardware=8xa100_80gb"]).config, world_size=8)
    assert (plan.hardware.device_count, plan.world_size) == (8, 8), (
        "the plan is told how many the launcher started"
    )


@pytest.mark.parametrize(
    ("visible", "nvlink_of", "linked"),
    [
        ("3,4", {3}, True),
        ("3,4", {0}, False),
        ("GPU-1a2b,GPU-3c4d", {"GPU-1a2b"}, True),
        (None, {0}, True),
    ],
)
def test_nvlink_is_asked_of_the_first_gpu_of_this_process(
    visible: str | None,
    nvlink_of: set[Any],
    linked: bool,
    machine: Any,
    driver: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(2, "NVIDIA A100-SXM4-80GB", 79.15, 80)
    driver("580.65.06", 8, nvlink_of)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    card = CARDS["A100-80GB"]
    assert probe().link_bandwidth == (card.link_bandwidth if linked else card.pcie_bandwidth)


def test_a_build_without_kernels_for_the_card_is_refused(machine: Any, driver: Any) -> None:
    driver("580.65.06", 1)
    machine(1, "Tesla V100-SXM2-32GB", 31.7, 70)
    with pytest.raises(
        MissingPrerequisiteError, match=r"no kernels for Tesla V100.*compute capability 7\.0"
    ):
        probe()
    machine(1, "Tesla V100-SXM2-32GB", 31.7, 70, built="cu126")
    assert probe().compute_capability == 70
    # A later minor number runs what was compiled for an earlier one, and a later generation what is
    # compiled on the way.
    for capability in (87, 89, 121):
        machine(1, "NVIDIA Something", 20, capability)
        assert probe().compute_capability == capability


def test_cards_without_bf16_are_refused_bf16(machine: Any, driver: Any) -> None:
    driver("580.65.06", 1)
    machine(1, "Tesla T4", 14.6, 75)
    with pytest.raises(
        ConfigError,
        match=r"precision=bf16: Tesla T4 \(compute capability 7\.5\).*take precision=fp16",
    ):
        resolve_ladder(compose_config(["model=tiny"]).config)
    for precision in ("fp16", "fp32"):
        assert (
            resolve_ladder(compose_config(["model=tiny", f"precision={precision}"]).config).chosen
            is not None
        )


@pytest.mark.parametrize("card", ["A100-80GB", "H100", "RTX 3090"])
def test_fp32_is_planned_at_the_rate_of_fp32(card: str, machine: Any, driver: Any) -> None:
    """Not at that of TF32, which nothing switches on."""
    machine(1, card, 79, CARDS[card].compute_capability)
    driver("580.65.06", 1)
    job = [
        "model=llama3_8b",
        "data.train=x",
        "train.global_batch_size=8",
        "zero=0",
        "train.gradient_checkpointing=true",
    ]
    seconds = {}
    for precision in ("bf16", "fp32"):
        ladder = resolve_ladder(compose_config([*job, f"precision={precision}"]).config)
        rung = next(rung for rung in ladder.rungs if rung.candidate is not None)
        assert rung.candidate is not None
        seconds[precision] = rung.candidate.speed.terms["compute"]
    assert seconds["fp32"] / seconds["bf16"] == pytest.approx(
        CARDS[card].flops / CARDS[card].fp32_flops, rel=0.1
    )


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/slurm/uid_1/job_7/step_0\n", {"slurm/uid_1/job_7/memory.max": 64}, 64),
        ("0::/slurm/job_7\n", {"slurm/job_7/memory.max": "max", "memory.max": 32}, 32),
        ("0::/\n", {"memory.max": 16}, 16),
        ("0::/\n", {}, 900),
        ("5:memory:/slurm/job_7\n0::/\n", {"memory/slurm/job_7/memory.limit_in_bytes": 48}, 48),
        ("5:cpu,cpuacct:/x\n4:memory:/\n", {"memory/memory.limit_in_bytes": 2**63 // GIB}, 900),
    ],
)
def test_host_memory_is_what_the_control_groups_leave(
    groups: str, limits: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, limit in limits.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit if limit == 'max' else limit * GIB}\n")
    assert probe_host_memory_bytes(tmp_path) == expected * GIB


@pytest.mark.parametrize(
    ("torch_version", "given", "expected"),
    [
        ("2.13.0", {}, "expandable_segments:True,pinned_max_round_threshold_mb:16"),
        ("2.14.1+cu130", {}, "expandable_segments:True,pinned_max_round_threshold_mb:16"),
        ("2.7.1", {}, "expandable_segments:True"),
        ("2.13.0", {"PYTORCH_ALLOC_CONF": "backend:native"}, None),
        ("2.13.0", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
    ],
)
@pytest.mark.parametrize("launched", [True, False])
def test_allocators_are_told_what_they_know_and_users_win(
    launched: bool,
    torch_version: str,
    given: dict[str, str],
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rank of a foreign launcher sets it ahead of all other variables, our own supervisor among
    them.
    """
    monkeypatch.setattr(gpus, "_torch_version", lambda: torch_version)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if launched:
        set_allocator_default()
    set_defaults("cuda", 1)
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected
    assert os.environ.get("PYTORCH_ALLOC_CONF") == given.get("PYTORCH_ALLOC_CONF")


def test_pinned_memory_is_planned_as_it_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-2-7B on one GPU, optimizer on the host: fp32 weights of 26.95 GB are pinned, and become
    34.36 where rounded.
    """
    job = [
        "model=llama2_7b",
        "data.train=x",
        "tuner=full",
        "hardware=1xh200",
        "offload=optimizer_cpu",
        "zero=2",
    ]

    def host() -> MemoryPlan:
        config = compose_config([*job, "hardware.host_memory_bytes=1TiB"]).config
        rungs = resolve_ladder(config, planning=True).rungs
        found = next(
            rung.candidate for rung in rungs if rung.candidate and rung.name == "optimizer_cpu"
        )
        assert found.placement.zero_stage == 2
        return found.memory

    monkeypatch.setattr(peak_memory, "pins_exactly", lambda: True)
    exact = host().host.optimizer
    monkeypatch.setattr(peak_memory, "pins_exactly", lambda: False)
    rounded = host().host.optimizer
    parameters = 6_738_415_616
    expected = (2**35 - 4 * parameters) + (2**34 - 2 * parameters)
    assert rounded - exact == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("built", "said"),
    [
        (None, "is built for CPUs"),
        ("13.0", "built for CUDA 13.0, cannot use it: usually the driver"),
    ],
)
def test_the_doctor_says_why_the_gpus_are_not_used(
    built: str | None, said: str, machine: Any, driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(0, "", 0, 0)
    driver("535.104.05", 2)
    monkeypatch.setattr(torch.version, "cuda", built)
    (finding,) = inspect_cuda()
    assert (finding.state, finding.command) == ("bad", "bash scripts/setup.sh")
    assert said in finding.message
    assert "2 NVIDIA GPUs with driver 535.104.05" in finding.message
    driver("535.104.05", 0)
    (finding,) = inspect_cuda()
    assert finding.state == "ok"


@pytest.mark.parametrize(
    ("rank", "ranks", "visible", "bound_before", "expected", "threads"),
    [
        # Eight share the cores of two sockets, four those of one.
        (0, 8, None, range(192), range(96), 24),
        (1, 8, None, range(192), range(96, 192), 24),
        (1, 2, "5,4", range(192), range(96), 96),
        # Both are near the same socket.
        (1, 2, "4,6", range(192), range(96), 48),
        (0, 1, None, range(192), range(96), 96),
        # A task of Slurm that sees its own GPU only, and does not know the others'.
        (3, 8, "7", range(192), range(96, 192), 24),
        (0, 8, None, range(8), None, None),
    ],
)
def test_ranks_keep_to_the_cores_near_their_gpu(
    rank: int,
    ranks: int,
    visible: str | None,
    bound_before: range,
    expected: range | None,
    threads: int | None,
    driver: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver("580.65.06", 8)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    bound: list[set[int]] = []
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(bound_before))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound.append(cores))
    # Those that every rank is given of the machine's.
    told: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 192 // ranks)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    assert bind_to_gpu(rank, ranks) == (None if expected is None else set(expected))
    assert told == ([] if threads is None else [threads])
    assert bound == ([] if expected is None else [set(expected)])
