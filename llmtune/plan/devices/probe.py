"""Take the hardware of a run from the config, or probe this machine for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from llmtune.config.byte_sizes import parse_bytes
from llmtune.config.groups.hardware import Accelerator, HardwareConfig
from llmtune.errors import MissingPrerequisiteError
from llmtune.plan.devices.cards import CARDS, UNKNOWN, Card, find_card
from llmtune.plan.devices.gpus import check_hidden_gpus, check_kernels, has_nvlink, visible_gpus
from llmtune.plan.devices.hardware import Hardware
from llmtune.units import counted, format_bytes

#: Memory bandwidth of a node with two sockets of eight channels. The data sheet says 400 GB/s; the
#: optimizer reaches about this.
SERVER_MEMORY_BANDWIDTH = 250e9
#: Share of the CPU's own matrix multiplication that a training step reaches (SmolLM2-135M on 2
#: cores).
CPU_EFFICIENCY = 0.35
#: One core's, without and with bf16 instructions (2 EPYC cores: 200 GFLOP/s in fp32, 440 in bf16).
CPU_FLOPS_PER_CORE = {False: 100e9, True: 220e9}


def resolve_hardware(
    config: HardwareConfig,
    nvme_path: str | None = None,
    planning: bool = False,
    ranks_on_node: int | None = None,
) -> Hardware:
    """Take what the config leaves open from this machine.

    Args:
        planning: The job is planned only, so that named hardware need not be present.
        ranks_on_node: Ranks that a foreign launcher started here; each may see only one GPU.

    Raises:
        MissingPrerequisiteError: CUDA was requested and there is none, torch cannot use the GPUs,
            or ``offload.nvme_path`` cannot be used.
    """
    named = (
        planning and config.accelerator is Accelerator.cuda and config.gpu_memory_bytes is not None
    )
    hardware = _named(config) if named else _probed(config, planning, ranks_on_node)
    hardware = replace(hardware, nodes=config.nodes, **_stated(config))
    known = (
        find_card(hardware.name, hardware.device_memory_bytes) is not None
        or config.gpu_flops is not None
    )
    if hardware.accelerator == "cuda" and not known:
        hardware = replace(hardware, notes=(*hardware.notes, _describe_unknown(hardware.name)))
    if nvme_path is not None and config.nvme_bytes is None:
        folder = resolve_nvme_folder(nvme_path)
        hardware = replace(hardware, nvme_bytes=shutil.disk_usage(folder).free)
    return hardware


def resolve_accelerator(setting: Accelerator) -> str:
    """Return ``cuda`` or ``cpu``.

    Raises:
        The errors of :func:`resolve_hardware`.
    """
    return _accelerator(setting, len(visible_gpus()))


def resolve_nvme_folder(nvme_path: str) -> Path:
    """Make the folder if it is missing, and return it.

    Raises:
        MissingPrerequisiteError: It cannot be made or written.
    """
    folder = Path(nvme_path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MissingPrerequisiteError(
            f"offload.nvme_path={nvme_path}: {error.strerror}; name a folder on a local disk"
        ) from error
    if not os.access(folder, os.W_OK):
        raise MissingPrerequisiteError(
            f"offload.nvme_path={nvme_path}: not writable; name a folder on a local disk"
        )
    return folder


def _named(config: HardwareConfig) -> Hardware:
    """Return the hardware from the config alone."""
    memory = parse_bytes(config.gpu_memory_bytes, "hardware.gpu_memory_bytes")
    card = find_card(config.gpu_name, memory) or UNKNOWN
    host_bytes = probe_host_memory_bytes()
    if config.host_memory_bytes is not None:
        host_bytes = parse_bytes(config.host_memory_bytes, "hardware.host_memory_bytes")
    return _with_card(card, config.gpu_name or "", config.gpus_per_node or 1, memory, host_bytes)


def _probed(config: HardwareConfig, planning: bool, ranks_on_node: int | None) -> Hardware:
    gpus = visible_gpus()
    accelerator = _accelerator(config.accelerator, len(gpus))
    notes: list[str] = []

    # Host memory, which is also that of a rank on the CPU.
    host_bytes = _within(
        config.host_memory_bytes, "host_memory_bytes", probe_host_memory_bytes(), planning, notes
    )
    if accelerator == "cpu":
        cores = len(os.sched_getaffinity(0))
        flops = config.gpu_flops or _cpu_flops(cores)
        return Hardware(
            accelerator="cpu",
            device_count=1,
            device_memory_bytes=host_bytes,
            host_memory_bytes=host_bytes,
            name="CPU",
            flops=flops,
            efficiency=CPU_EFFICIENCY,
            notes=tuple(notes),
        )
    # A task of Slurm often sees only its own GPU.
    present = max(len(gpus), ranks_on_node or 0)
    count = config.gpus_per_node or present
    if count > present:
        raise MissingPrerequisiteError(
            f"hardware.gpus_per_node={count}: this machine has {counted(present, 'GPU')}; take"
            " hardware=probe to use what is there"
        )

    # The speeds of the card: the one that is named, if the job is only planned.
    first = gpus[0]
    check_kernels(first)
    device_bytes = _within(
        config.gpu_memory_bytes, "gpu_memory_bytes", first.memory_bytes, planning, notes
    )
    name = config.gpu_name if planning and config.gpu_name else first.name
    card = find_card(name, device_bytes) or UNKNOWN
    if config.gpu_name and card not in (
        find_card(config.gpu_name),
        find_card(config.gpu_name, device_bytes),
    ):
        notes.append(
            f"hardware.gpu_name={config.gpu_name}: this machine has {first.name}, which is"
            " planned for"
        )

    # Links between the cards.
    hardware = _with_card(card, name, count, device_bytes, host_bytes)
    hardware = replace(hardware, compute_capability=first.compute_capability, notes=tuple(notes))
    if count > 1 and not has_nvlink():
        hardware = replace(hardware, link_bandwidth=card.pcie_bandwidth)
    return hardware


def _within(setting: Any, key: str, probed: int, planning: bool, notes: list[str]) -> int:
    """Return the bytes of a memory: those of the config, at most those that were probed."""
    if setting is None:
        return probed
    named = parse_bytes(setting, f"hardware.{key}")
    if planning or named <= probed:
        return named
    # The 80 GB of a data sheet are a little less to programs.
    if named > 1.05 * probed:
        notes.append(
            f"hardware.{key}={setting}: this machine has {format_bytes(probed)}, which is planned"
            " for"
        )
    return probed


def _with_card(card: Card, name: str, count: int, memory: int, host_bytes: int) -> Hardware:
    return Hardware(
        accelerator="cuda",
        device_count=count,
        device_memory_bytes=memory,
        host_memory_bytes=host_bytes,
        name=name,
        flops=card.flops,
        fp32_flops=card.fp32_flops,
        compute_capability=card.compute_capability,
        efficiency=card.efficiency,
        link_bandwidth=card.link_bandwidth,
        pcie_bandwidth=card.pcie_bandwidth,
        host_memory_bandwidth=min(SERVER_MEMORY_BANDWIDTH, 40e9 * count),
    )


def _describe_unknown(name: str) -> str:
    known = next((card for card in CARDS if name and name.upper() in card.split()), None)
    meant = f" (did you mean hardware.gpu_name={known!r}?)" if known else ""
    return (
        f"the speed of {name or 'a GPU without a name'} is not known{meant}:"
        f" {UNKNOWN.flops / 1e12:.0f} TFLOP/s are assumed; hardware.gpu_flops= sets another"
    )


def _stated(config: HardwareConfig) -> dict[str, Any]:
    """Return the config's speeds and drives, by the fields of :class:`Hardware`."""
    sizes: dict[str, Any] = {
        "nvme_bytes": config.nvme_bytes,
        "link_bandwidth": config.gpu_link_bandwidth,
        "pcie_bandwidth": config.pcie_bandwidth,
        "network_bandwidth": config.network_bandwidth,
        "host_memory_bandwidth": config.host_memory_bandwidth,
        "nvme_read_bandwidth": config.nvme_read_bandwidth,
        "nvme_write_bandwidth": config.nvme_write_bandwidth,
    }
    keys = {"link_bandwidth": "gpu_link_bandwidth"}
    values: dict[str, Any] = {
        name: parse_bytes(value, f"hardware.{keys.get(name, name)}")
        for name, value in sizes.items()
        if value is not None
    }
    rates = {"flops": config.gpu_flops, "efficiency": config.compute_efficiency}
    values |= {name: rate for name, rate in rates.items() if rate is not None}
    return values


def choose_accelerator(setting: Accelerator, gpus: int) -> str:
    """Return the accelerator of the config or of DeepSpeed's variable, or the one that is present.

    It is not checked.
    """
    if setting is not Accelerator.auto:
        return setting.name
    return os.environ.get("DS_ACCELERATOR", "cuda" if gpus else "cpu")


def _accelerator(setting: Accelerator, cuda_devices: int) -> str:
    name = choose_accelerator(setting, cuda_devices)
    origin = "DS_ACCELERATOR" if setting is Accelerator.auto else "hardware.accelerator"
    if name not in ("cuda", "cpu"):
        raise MissingPrerequisiteError(f"{origin}={name}: llmtune knows cuda and cpu")
    if name == "cpu" and setting is Accelerator.auto and "DS_ACCELERATOR" not in os.environ:
        check_hidden_gpus()
    if name == "cuda" and not cuda_devices:
        raise MissingPrerequisiteError(
            f"{origin}=cuda, but torch sees no CUDA device: install a CUDA build of torch and check"
            " nvidia-smi, or take hardware=probe hardware.accelerator=cpu"
        )
    return name


def probe_host_memory_bytes(root: Path = Path("/")) -> int:
    """Return the physical memory, or the lowest limit of this process's control groups.

    Containers and jobs of Slurm set such limits.

    Args:
        root: Root of the file system, for tests.
    """
    limits = [psutil.virtual_memory().total]
    for file in _memory_limits(root):
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def _memory_limits(root: Path) -> Iterator[Path]:
    """List the files with the limits of this process's control groups, of both versions."""
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = ["0::/", "0:memory:/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = mounted, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = mounted / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = Path(path.lstrip("/"))
        for folder in (own, *own.parents):
            yield base / folder / name


def _cpu_flops(cores: int) -> float:
    """Return the operations per second by the cores' instructions.

    They are not measured, so that two starts of a run plan the same.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    has_bf16 = "avx512_bf16" in flags or "amx_bf16" in flags
    return cores * CPU_FLOPS_PER_CORE[has_bf16]


def fp16_supported(accelerator: str) -> bool:
    """Tell whether DeepSpeed takes fp16: on GPUs, and on CPUs whose mkldnn has it."""
    import torch

    return accelerator == "cuda" or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
