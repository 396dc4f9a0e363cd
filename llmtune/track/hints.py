"""Hints while training: what slows a run down or spoils it, the number that shows it, a remedy.

Each is said once. Rules look at the records of the last steps, and at the machine.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil

from llmtune.plan.devices.gpu_state import GpuState, read_gpus
from llmtune.plan.devices.gpus import has_nvlink
from llmtune.track.tracker import Outcome, Record
from llmtune.units import format_bytes

#: Steps that a rule about speed looks at, and the first steps of a start, which no rule sees.
WINDOW, WARM_UP = 20, 3
#: Seconds between two readings of the machine, and readings that a rule about GPUs looks at.
READ_SECONDS, READINGS = 10.0, 12

#: Limits of the rules.
_MOST_DATA = 0.1
_MOST_GATHER = 0.4
_MOST_GATHER_OF_STEP = 0.2
_LEAST_USED = 0.6
_NORM_FACTOR, _NORM_TIMES = 10, 3
_LOSS_STEPS = 100
_SHM_SHARE = 0.9
_SLOW_RANK_FACTOR, _SLOW_RANK_OF_STEP = 1.3, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Readings of the machine; None where it does not know one."""

    shm_used: float | None = None
    """Share of ``/dev/shm`` that is in use."""
    shm_free_bytes: int = 0
    gpus: Sequence[GpuState] = ()
    has_nvlink: bool = True


class MachineReader:
    """Reads the machine every now and then, since NVML takes a millisecond for each GPU."""

    def __init__(
        self,
        shm: str = "/dev/shm",
        read_gpus: Callable[[], Sequence[GpuState]] = read_gpus,
        has_nvlink: Callable[[], bool] = has_nvlink,
    ):
        """
        Args:
            shm: Shared memory, through which workers and NCCL exchange data.
        """
        self._shm = shm
        self._read_gpus = read_gpus
        self._has_nvlink = has_nvlink
        self._next = 0.0
        self._last = Machine()

    def read(self) -> Machine:
        """Return the last reading; a new object only where it was read anew."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + READ_SECONDS
            self._last = self._read()
        return self._last

    def _read(self) -> Machine:
        gpus = tuple(self._read_gpus())
        nvlink = len(gpus) < 2 or self._has_nvlink()
        try:
            usage = psutil.disk_usage(self._shm)
        except OSError:
            return Machine(gpus=gpus, has_nvlink=nvlink)
        return Machine(
            shm_used=usage.percent / 100,
            shm_free_bytes=usage.free,
            gpus=gpus,
            has_nvlink=nvlink,
        )


@dataclass(slots=True, kw_only=True)
class History:
    """The records of this start that rules look at."""

    steps: deque[Record] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """The newest steps, without the first of this start."""
    losses: list[float] = field(default_factory=list)
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=5 * WINDOW))
    machine: Machine = Machine()
    readings: deque[Machine] = field(default_factory=lambda: deque(maxlen=READINGS))
    """The newest readings of GPUs, without those of the first steps."""
    seen: int = 0

    def add(self, record: Record, machine: Machine) -> None:
        """Take the record of a step."""
        self.seen += 1
        if machine is not self.machine and machine.gpus and self.seen > WARM_UP:
            self.readings.append(machine)
        self.machine = machine
        self.losses.append(record["loss"])
        self.norms.append(record["grad_norm"])
        if self.seen > WARM_UP:
            self.steps.append(record)

    def mean(self, key: str) -> float:
        """Return the mean of a key over the newest steps; 0 for those without it."""
        return statistics.fmean(record.get(key, 0.0) for record in self.steps)

    @property
    def is_full(self) -> bool:
        """Tell whether there are enough steps for a rule about speed."""
        return len(self.steps) == WINDOW


def find_data_wait(history: History) -> str | None:
    """Find that steps wait for their rows."""
    if not history.is_full:
        return None
    wait, seconds = history.mean("data_seconds"), history.mean("seconds")
    if wait <= _MOST_DATA * seconds:
        return None
    return (
        f"waiting for data takes {100 * wait / seconds:.0f} % of a step ({wait:.3f} of"
        f" {seconds:.3f} s): take a larger data.dataloader_num_workers"
    )


def find_gathers(history: History) -> str | None:
    """Find that layers wait for weights more than they compute."""
    if not history.is_full:
        return None
    gather = history.mean("gather_seconds")
    passes = history.mean("forward_seconds") + history.mean("backward_seconds")
    if gather <= _MOST_GATHER * passes:
        return None
    return (
        f"layers wait {100 * gather / passes:.0f} % of the forward and backward pass for weights"
        " that ZeRO 3 gathers: take a larger train.per_device_train_batch_size, or zero=2 where"
        " llmtune plan says that it fits"
    )


def find_full_shm(history: History) -> str | None:
    """Find that shared memory runs out, which ends workers with a bus error."""
    machine = history.machine
    if machine.shm_used is None or machine.shm_used < _SHM_SHARE:
        return None
    return (
        f"/dev/shm is {100 * machine.shm_used:.0f} % full ({format_bytes(machine.shm_free_bytes)}"
        " free), and workers end with a bus error when it is full: start the container with a"
        " larger --shm-size, or take data.dataloader_num_workers=0"
    )


def find_flat_loss(history: History) -> str | None:
    """Find that the loss is no lower than at the beginning."""
    if len(history.losses) < _LOSS_STEPS:
        return None
    first = statistics.fmean(history.losses[:WINDOW])
    last = statistics.fmean(history.losses[-WINDOW:])
    if last < first:
        return None
    return (
        f"the loss does not fall: {first:.4f} in the first {WINDOW} steps, {last:.4f} in the last"
        f" {WINDOW} of {len(history.losses)}: try another optim.learning_rate, and look at what is"
        " trained with llmtune data"
    )


def find_exploding_norm(history: History) -> str | None:
    """Find gradients that are many times as large as before."""
    norms = list(history.norms)
    if len(norms) < 2 * WINDOW:
        return None
    usual = statistics.median(norms[:-WINDOW])
    high = [norm for norm in norms[-WINDOW:] if norm > _NORM_FACTOR * usual]
    if len(high) < _NORM_TIMES or usual <= 0:
        return None
    return (
        f"the gradient's norm was {max(high):.3g} in {len(high)} of the last {WINDOW} steps, and"
        f" {usual:.3g} before: take a smaller optim.learning_rate or train.max_grad_norm"
    )


def make_reader(accelerator: str) -> MachineReader:
    """Make a reader of this machine; a run on the CPU has nothing to do with its GPUs.

    Args:
        accelerator: Of the plan's hardware.
    """
    return MachineReader() if accelerator == "cuda" else MachineReader(read_gpus=list)


def find_idle_gpus(history: History) -> str | None:
    """Find that GPUs wait for something."""
    used = [
        gpu.utilization
        for machine in history.readings
        for gpu in machine.gpus
        if gpu.utilization is not None
    ]
    if len(history.readings) < READINGS or not used or statistics.fmean(used) >= _LEAST_USED:
        return None
    minutes = READINGS * READ_SECONDS / 60
    return (
        f"GPUs worked {100 * statistics.fmean(used):.0f} % of the last {minutes:.0f} minutes: the"
        " table at the end says where the time went; take a larger"
        " train.per_device_train_batch_size where memory is left"
    )


def find_slowed_gpu(history: History) -> str | None:
    """Find a GPU whose clock is held down, which all others then wait for."""
    if len(history.readings) < READINGS:
        return None
    slowed = Counter(
        (gpu.index, gpu.slowed_by)
        for machine in history.readings
        for gpu in machine.gpus
        if gpu.slowed_by is not None
    )
    if not slowed or slowed.most_common(1)[0][1] < READINGS / 2:
        return None
    (index, reason), times = slowed.most_common(1)[0]
    degrees = next(gpu.temperature for gpu in history.machine.gpus if gpu.index == index)
    shown = "" if degrees is None else f" at {degrees:.0f} degrees Celsius"
    return (
        f"GPU {index} is slowed down by {reason}{shown}, in {times} of {READINGS} readings, and"
        " every rank waits for the slowest: look at its cooling and its power supply (nvidia-smi"
        " -q -d PERFORMANCE)"
    )


def find_slow_links(history: History) -> str | None:
    """Find that gathers go through PCIe, where they take long."""
    if not history.is_full or history.machine.has_nvlink:
        return None
    gather, seconds = history.mean("gather_seconds"), history.mean("seconds")
    if gather <= _MOST_GATHER_OF_STEP * seconds:
        return None
    return (
        f"gathers take {100 * gather / seconds:.0f} % of a step, and the GPUs have no NVLink: ZeRO"
        " 2 or 1 sends less, where llmtune plan says that it fits"
    )


def find_slow_rank(history: History) -> str | None:
    """Find a rank that all others wait for."""
    record = history.steps[-1] if history.steps else {}
    if "slowest_rank" not in record:
        return None
    slowest, others = record["slowest_rank_seconds"], record["other_ranks_seconds"]
    lost = slowest - others
    if slowest <= _SLOW_RANK_FACTOR * others or lost <= _SLOW_RANK_OF_STEP * record["seconds"]:
        return None
    return (
        f"rank {record['slowest_rank']} takes {slowest:.3f} s for the rows and the forward pass of"
        f" a step, the others {others:.3f} s (median), and all wait for it: look at what else runs"
        " on its GPU and cores, and at its clock and temperature (nvidia-smi, top, llmtune doctor"
        " on its machine)"
    )


Rule = Callable[[History], str | None]

RULES: Sequence[Rule] = (
    find_data_wait,
    find_gathers,
    find_slow_links,
    find_idle_gpus,
    find_slowed_gpu,
    find_slow_rank,
    find_full_shm,
    find_flat_loss,
    find_exploding_norm,
)


class Hints:
    """A tracker that looks at every step's record, and says each hint once."""

    def __init__(
        self,
        say: Callable[[str], None],
        read_machine: Callable[[], Machine],
        rules: Sequence[Rule] = RULES,
    ):
        """
        Args:
            say: Shows a line to the user.
            read_machine: Called once for each record.
        """
        self._say = say
        self._read_machine = read_machine
        self._rules = list(rules)
        self._history = History()

    def log(self, record: Record) -> None:
        """Look at the record of a step."""
        if record.get("grad_norm") is None or record.get("skipped"):
            return
        self._history.add(record, self._read_machine())
        for rule in list(self._rules):
            if (hint := rule(self._history)) is not None:
                self._say(f"hint: {hint}")
                self._rules.remove(rule)

    def finish(self, outcome: Outcome) -> None:
        """Do nothing: there is nothing to close."""
