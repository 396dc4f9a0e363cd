"""The GPUs that this process may use, by torch and by NVIDIA's management library (NVML)."""

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
#: The setting that keeps large blocks of pinned memory from being rounded up, and torch's first
#: version with it.
EXACT_PINS = "pinned_max_round_threshold_mb"
_FIRST_WITH_EXACT_PINS = (2, 13)

#: Compute capability (Ampere) from which GPUs have bf16 and FlashAttention's kernels.
FIRST_WITH_BF16 = 80


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that torch can use."""

    name: str
    memory_bytes: int
    compute_capability: int
    """Ten times the major version plus the minor one: 80 for an A100, 75 for a T4."""


def visible_gpus() -> list[Gpu]:
    """List the GPUs in torch's order.

    Without a driver's library there are none, and torch, which takes a second to import, is not
    needed.
    """
    if "torch" not in sys.modules and not any(map(_can_load, ("libcuda.so.1", "libamdhip64.so"))):
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [Gpu(gpu.name, int(gpu.total_memory), 10 * gpu.major + gpu.minor) for gpu in devices]


def check_kernels(gpu: Gpu) -> None:
    """Refuse a GPU for which this torch has no kernels; torch itself fails only at the first one.

    Raises:
        MissingPrerequisiteError: torch was compiled for other generations.
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
    """Tell whether code named ``sm_80`` or ``compute_80`` runs on a GPU.

    ``sm_80`` is machine code for its generation from that minor version on; ``compute_80`` is
    compiled on the GPU's machine.
    """
    kind, _, version = name.partition("_")
    digits = "".join(character for character in version if character.isdigit())
    built = int(digits or 0)
    if kind == "compute":
        return built <= capability
    return built // 10 == capability // 10 and built <= capability


def hidden_gpus() -> str | None:
    """Describe the GPUs that the driver has and torch cannot use; None if there are none.

    GPUs that ``CUDA_VISIBLE_DEVICES`` hides from this process are hidden on purpose.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not _names_gpus(visible):
        return None
    try:
        nvml = start_nvml()
        count = int(nvml.nvmlDeviceGetCount())
        driver = _text(nvml.nvmlSystemGetDriverVersion())
    except Exception:
        return None
    return f"{counted(count, 'NVIDIA GPU')} with driver {driver}" if count else None


def count_gpus() -> int:
    """Count the GPUs of this process quickly, by NVML and ``CUDA_VISIBLE_DEVICES``; 0 without NVML.

    torch may be unable to use them; see :func:`visible_gpus`.
    """
    try:
        count = int(start_nvml().nvmlDeviceGetCount())
    except Exception:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    # CUDA stops reading at the first entry that names no GPU.
    named = takewhile(lambda name: _names_gpu(name, count), visible.split(","))
    return len(list(named))


def _names_gpu(name: str, count: int) -> bool:
    return _names_gpus(name) and (not name.strip().isdigit() or int(name) < count)


def check_hidden_gpus() -> None:
    """Refuse a run that would use the CPU only because torch cannot use the GPUs.

    Raises:
        MissingPrerequisiteError: There are GPUs; it names the driver and torch's build.
    """
    gpus = hidden_gpus()
    if gpus is None:
        return
    import torch

    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs only"
    raise MissingPrerequisiteError(
        f"this machine has {gpus}, but torch {torch.__version__}, which is built {built}, cannot"
        " use them. Run bash scripts/setup.sh, which installs the build for the driver;"
        " hardware.accelerator=cpu trains on the CPU all the same"
    )


def knows_exact_pins() -> bool:
    """Tell whether the installed torch knows ``EXACT_PINS``; an older one refuses it."""
    version = _torch_version()
    if version is None:
        return False
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= _FIRST_WITH_EXACT_PINS


@functools.cache
def _torch_version() -> str | None:
    """Return the version of the installed torch, cached because it is read from the disk."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def pins_exactly() -> bool:
    """Tell whether ranks will pin as many bytes as requested, not the next power of two."""
    for name in ALLOCATOR_VARIABLES:
        if name in os.environ:
            return EXACT_PINS in os.environ[name]
    return knows_exact_pins()


def has_nvlink() -> bool:
    """Tell whether the first GPU of this process has an active NVLink; True without NVML."""
    try:
        nvml = start_nvml()
        handle = find_handle(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        links = range(nvml.NVML_NVLINK_MAX_LINKS)
        return any(_link_is_active(nvml, handle, link) for link in links)
    except Exception:
        return True


def near_cores(index: int) -> set[int]:
    """Return the cores on the NUMA node of a GPU of this process; none without NVML.

    Args:
        index: Index among the GPUs that this process may use.
    """
    try:
        nvml = start_nvml()
        handle = find_handle(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"), index)
        words = nvml.nvmlDeviceGetCpuAffinity(handle, -(-(os.cpu_count() or 1) // 64))
    except Exception:
        return set()
    return {core for core in range(64 * len(words)) if int(words[core // 64]) >> core % 64 & 1}


def start_nvml() -> Any:
    """Start NVML, and return its module.

    Raises:
        OSError: There is no driver; pynvml is not imported then.
    """
    if "pynvml" not in sys.modules:
        ctypes.CDLL("libnvidia-ml.so.1")
    import pynvml

    pynvml.nvmlInit()
    return pynvml


def find_handle(pynvml: Any, visible: str | None, index: int = 0) -> Any:
    """Return NVML's handle of a GPU of this process.

    NVML ignores ``CUDA_VISIBLE_DEVICES``, which holds indices or names of GPUs and their slices
    (``GPU-...``, ``MIG-...``).
    """
    names = [str(index)] if visible is None else [name.strip() for name in visible.split(",")]
    name = names[min(index, len(names) - 1)]
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


def _names_gpus(visible: str) -> bool:
    """Tell whether the first entry names a GPU; CUDA stops reading at one that does not."""
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
