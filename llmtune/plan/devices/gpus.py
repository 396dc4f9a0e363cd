"""The GPUs that this process may use, as torch sees them, and what NVIDIA's library knows beside
it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import sys
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from llmtune.errors import MissingPrerequisiteError
from llmtune.units import counted

#: Where torch reads the settings of its allocators; the first wins.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
#: The setting that leaves large blocks of pinned memory as they are, and torch's first version that
#: knows it.
EXACT_PINS, _FIRST_WITH_EXACT_PINS = "pinned_max_round_threshold_mb", (2, 13)

#: Compute capability (Ampere) from which GPUs have bf16 and FlashAttention's kernels.
FIRST_WITH_BF16 = 80


@dataclass(frozen=True, slots=True)
class Gpu:
    """One that torch can use."""

    name: str
    memory_bytes: int
    compute_capability: int
    """Ten times the major number and the minor one: 80 of an A100, 75 of a T4."""


def visible_gpus() -> list[Gpu]:
    """In torch's order.

    Without a driver's library there are none, and torch, which takes a second, is not asked.
    """
    if "torch" not in sys.modules and not any(map(_can_load, ("libcuda.so.1", "libamdhip64.so"))):
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [Gpu(gpu.name, int(gpu.total_memory), 10 * gpu.major + gpu.minor) for gpu in found]


def check_kernels(gpu: Gpu) -> None:
    """torch is compiled for some generations of GPUs, and says so only when the first kernel is
    started.

    Raises:
        MissingPrerequisiteError: Not for this one.
    """
    import torch

    built = torch.cuda.get_arch_list()
    if built and not any(_runs_on(name, gpu.compute_capability) for name in built):
        raise MissingPrerequisiteError(
            f"torch {torch.__version__} has no kernels for {gpu.name} (compute capability"
            f" {gpu.compute_capability / 10:.1f}); it has {', '.join(built)}. Install a build that"
            " has them: python -m llmtune doctor says which"
        )


def _runs_on(name: str, capability: int) -> bool:
    """``sm_80`` is machine code for its generation from that minor number on; ``compute_80`` is
    compiled where it runs.
    """
    kind, _, number = name.partition("_")
    digits = "".join(character for character in number if character.isdigit())
    built = int(digits or 0)
    if kind == "compute":
        return built <= capability
    return built // 10 == capability // 10 and built <= capability


def hidden_gpus() -> str | None:
    """NVIDIA GPUs that the driver has and torch cannot use, with the driver's version; None where
    there are none.

    GPUs that ``CUDA_VISIBLE_DEVICES`` hides from this process are hidden on purpose.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not _names_gpus(visible):
        return None
    if "pynvml" not in sys.modules and not _can_load("libnvidia-ml.so.1"):
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
    except Exception:
        return None
    return f"{counted(count, 'NVIDIA GPU')} with driver {driver}" if count else None


def count_gpus() -> int:
    """GPUs that this process may use, as NVML and ``CUDA_VISIBLE_DEVICES`` say, in no time; 0 where
    NVML does not.

    Whether torch can use them is another question: :func:`visible_gpus`.
    """
    if "pynvml" not in sys.modules and not _can_load("libnvidia-ml.so.1"):
        return 0
    try:
        import pynvml

        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
    except Exception:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    # CUDA stops reading at the first that is none.
    return sum(
        1
        for _ in takewhile(
            lambda name: _names_gpus(name) and _is_there(name, count), visible.split(",")
        )
    )


def _is_there(name: str, count: int) -> bool:
    return not name.strip().isdigit() or int(name) < count


def check_hidden_gpus() -> None:
    """A run that would take the CPU because torch cannot use the GPUs does not begin.

    Raises:
        MissingPrerequisiteError: There are GPUs, with the driver and what torch was built for.
    """
    found = hidden_gpus()
    if found is None:
        return
    import torch

    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
    raise MissingPrerequisiteError(
        f"this machine has {found}, but torch {torch.__version__}, which is built {built}, cannot"
        " use them. Run bash scripts/setup.sh, which installs the build for the driver;"
        " hardware.accelerator=cpu trains on the CPU all the same"
    )


def knows_exact_pins() -> bool:
    """Whether the installed torch knows the setting; an older one refuses the word."""
    version = _torch_version()
    if version is None:
        return False
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= _FIRST_WITH_EXACT_PINS


@functools.cache
def _torch_version() -> str | None:
    """Of the installed one, which is asked for with every placement, and looked up on the disk."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def pins_exactly() -> bool:
    """Whether ranks will pin as many bytes as they ask for, and not the next power of two."""
    given = next((os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ), None)
    return knows_exact_pins() if given is None else EXACT_PINS in given


def has_nvlink() -> bool:
    """Whether the first GPU of this process has an active NVLink, by NVML; True where NVML does not
    say.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = _handle(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        links = range(pynvml.NVML_NVLINK_MAX_LINKS)
        return any(_link_is_active(pynvml, handle, link) for link in links)
    except Exception:
        return True


def near_cores(index: int) -> set[int]:
    """Numbers of the cores on the NUMA node of a GPU of this process; none where NVML does not say.

    Args:
        index: Among the GPUs that this process may use.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = _handle(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"), index)
        words = pynvml.nvmlDeviceGetCpuAffinity(handle, -(-(os.cpu_count() or 1) // 64))
    except Exception:
        return set()
    return {
        64 * place + bit
        for place, word in enumerate(words)
        for bit in range(64)
        if int(word) >> bit & 1
    }


def _handle(pynvml: Any, visible: str | None, index: int = 0) -> Any:
    """NVML knows nothing of ``CUDA_VISIBLE_DEVICES``, which counts or names GPUs and their slices
    (``GPU-...``, ``MIG-...``).
    """
    names = [str(index)] if visible is None else [name.strip() for name in visible.split(",")]
    name = names[min(index, len(names) - 1)]
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


def _names_gpus(visible: str) -> bool:
    """CUDA stops reading at the first entry that is none."""
    first = visible.split(",")[0].strip()
    return first.isdigit() or first.startswith(("GPU-", "MIG-"))


def _link_is_active(pynvml: Any, handle: Any, link: int) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetNvLinkState(handle, link))
    except pynvml.NVMLError:
        return False


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
