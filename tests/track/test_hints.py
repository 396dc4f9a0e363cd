"""Hints: each is said once for what it is about, and a healthy run has none."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from llmtune.plan.devices import gpu_state
from llmtune.plan.devices.gpu_state import GpuState
from llmtune.track.hints import READINGS, RULES, Hints, Machine, MachineReader, make_reader

HEALTHY: dict[str, Any] = {
    "seconds": 1.0,
    "data_seconds": 0.01,
    "forward_seconds": 0.3,
    "backward_seconds": 0.6,
    "gather_seconds": 0.1,
    "grad_norm": 1.0,
}
QUIET = Machine(shm_used=0.1, shm_free_bytes=10**9)


def said(
    steps: int = 150, machine: Machine = QUIET, since: int = 0, **changed: Any
) -> list[tuple[int, str]]:
    """The hints of a run whose records are changed from a step on, and after which step."""
    hints: list[tuple[int, str]] = []
    now = 0
    tracker = Hints(
        lambda text: hints.append((now, text)), lambda: machine if now > since else QUIET
    )
    for step in range(1, steps + 1):
        now = step
        record = {"step": step, "loss": 3.0 - 0.001 * step, **HEALTHY}
        tracker.log({**record, **changed} if step > since else record)
        tracker.log({"step": step, "eval_loss": 2.0})
    return hints


def test_a_healthy_run_has_none() -> None:
    assert said() == []


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"data_seconds": 0.34}, ["waiting for data takes 34 %", "dataloader_num_workers"]),
        ({"gather_seconds": 0.5}, ["wait 56 %", "zero=2"]),
        (
            {"slowest_rank": 3, "slowest_rank_seconds": 0.9, "other_ranks_seconds": 0.6},
            ["rank 3 takes 0.900 s", "the others 0.600 s", "nvidia-smi"],
        ),
        ({"loss": 3.0}, ["does not fall", "3.0000", "optim.learning_rate"]),
        ({"grad_norm": 30.0, "since": 60}, ["was 30 in 3 of the last 20", "max_grad_norm"]),
        ({"machine": Machine(shm_used=0.95, shm_free_bytes=3_000_000)}, ["95 % full", "3.0 MB"]),
    ],
)
def test_what_is_wrong_is_said_once_with_its_number(case: dict[str, Any], words: list[str]) -> None:
    hints = said(**case)
    assert len(hints) == 1, hints
    for word in words:
        assert word in hints[0][1]


@pytest.mark.parametrize(
    "changed",
    [
        # Neither a share of a rank's own time nor a share of a step is much by itself.
        {"slowest_rank": 3, "slowest_rank_seconds": 0.78, "other_ranks_seconds": 0.6},
        {"slowest_rank": 3, "slowest_rank_seconds": 0.15, "other_ranks_seconds": 0.05},
        {"data_seconds": 0.1},
        {"gather_seconds": 0.36},
        {"grad_norm": 10.0, "since": 60},
    ],
    ids=str,
)
def test_a_limit_itself_is_allowed(changed: dict[str, Any]) -> None:
    assert said(**changed) == []


def test_the_first_steps_do_not_count() -> None:
    """Their data, kernels and buffers are made then."""
    slow = {"data_seconds": 0.9}
    hints: list[str] = []
    tracker = Hints(hints.append, lambda: QUIET)
    for step in range(1, 60):
        tracker.log({"step": step, "loss": 3.0 / step, **HEALTHY, **(slow if step < 4 else {})})
    assert hints == []


def test_a_short_run_has_none() -> None:
    assert said(steps=1) == said(steps=19, data_seconds=0.9) == []


def test_records_without_phases_or_with_a_skipped_step_are_no_reason() -> None:
    hints: list[str] = []
    tracker = Hints(hints.append, make_reader("cpu").read)
    for step in range(1, 200):
        tracker.log({"step": step, "loss": 3.0 / step, "grad_norm": 1.0, "seconds": 1.0})
        tracker.log({"step": step, "loss": 9.0, "grad_norm": None, "skipped": True})
    assert hints == []


def test_every_rule_has_a_name_of_its_own() -> None:
    assert len({rule.__name__ for rule in RULES}) == len(RULES)


def test_a_machine_without_shared_memory_says_nothing_of_it() -> None:
    reader = MachineReader("/nowhere", read_gpus=list, has_nvlink=lambda: False)
    assert reader.read() == Machine()
    assert reader.read() is reader.read()


def test_a_run_on_the_cpu_does_not_look_at_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def read(name: str) -> list[GpuState]:
        asked.append(name)
        return [gpu()]

    defaults = ("/nowhere", lambda: read("cuda"), lambda: True)
    monkeypatch.setattr(MachineReader.__init__, "__defaults__", defaults)
    assert make_reader("cpu").read().gpus == ()
    assert make_reader("cuda").read().gpus == (gpu(),)
    assert asked == ["cuda"]


def gpu(index: int = 0, **changed: Any) -> GpuState:
    values = {
        "memory_used_bytes": 4e10,
        "memory_total_bytes": 8e10,
        "utilization": 0.95,
        "temperature": 70.0,
        "power": 300.0,
    }
    return GpuState(index=index, **{**values, **changed})


def said_of_gpus(readings: Sequence[Sequence[GpuState]], **changed: Any) -> list[str]:
    """The hints of a run with a step, and a reading of the machine, for each of these."""
    hints: list[str] = []
    now = 0
    has_nvlink = not changed.pop("no_nvlink", False)
    machines = [Machine(gpus=gpus, has_nvlink=has_nvlink) for gpus in readings]
    tracker = Hints(hints.append, lambda: machines[now])
    for now in range(len(machines)):
        tracker.log({"step": now + 1, "loss": 3.0 / (now + 1), **HEALTHY, **changed})
    return hints


def test_gpus_that_work_have_no_hint() -> None:
    assert said_of_gpus([[gpu(0), gpu(1, utilization=None)]] * 40) == []


def test_gpus_that_wait_are_named_with_their_share() -> None:
    (hint,) = said_of_gpus([[gpu(0, utilization=0.4), gpu(1, utilization=0.6)]] * 40)
    assert "GPUs worked 50 % of the last 2 minutes" in hint
    assert said_of_gpus([[gpu(utilization=0.1)]] * (READINGS + 2)) == []
    assert said_of_gpus([[gpu(utilization=0.6)]] * 40) == []


def test_a_gpu_that_is_slowed_down_is_named_with_the_reason() -> None:
    hot = gpu(3, slowed_by="heat (hardware)", temperature=92.0)
    (hint,) = said_of_gpus([[gpu(0), hot]] * 40)
    assert "GPU 3 is slowed down by heat (hardware) at 92 degrees Celsius, in 12 of 12" in hint
    # Once in a while it is nothing.
    assert said_of_gpus([[hot if number % 4 == 0 else gpu(3)] for number in range(40)]) == []


def test_gathers_without_nvlink_are_named() -> None:
    pair = [gpu(0), gpu(1)]
    (hint,) = said_of_gpus([pair] * 40, gather_seconds=0.3, no_nvlink=True)
    assert "gathers take 30 % of a step, and the GPUs have no NVLink" in hint
    assert said_of_gpus([pair] * 40, gather_seconds=0.3) == []


class FakeNvml:
    """The calls of pynvml that a reading makes, on a part of a GPU that does not tell its power."""

    NVML_TEMPERATURE_GPU = 0
    NVMLError = KeyError

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=1, total=2),
            "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=37),
            "nvmlDeviceGetTemperature": lambda *_: 55,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x40 if handle == 5 else 0x4,
        }

        def refuse(*_: Any) -> Any:
            raise KeyError(name)

        return answers.get(name, refuse)


def test_readings_are_those_of_the_gpus_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr(gpu_state, "count_gpus", lambda: 2)
    monkeypatch.setattr(gpu_state, "start_nvml", FakeNvml)
    first, second = gpu_state.read_gpus()
    assert (first.utilization, first.temperature, first.power) == (0.37, 55.0, None)
    assert (first.memory_used_bytes, first.memory_total_bytes) == (1.0, 2.0)
    # The second is the machine's GPU 5. Below the power cap (0x4) is where big cards work.
    assert (first.slowed_by, second.slowed_by) == (None, "heat (hardware)")
