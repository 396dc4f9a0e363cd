"""Findings about installed software: Python packages, CUDA, and the compiler of DeepSpeed's ops."""

import shutil
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from llmtune.doctor.finding import Finding
from llmtune.launch.preflight.deepspeed_ops import has_libaio
from llmtune.plan.devices.gpus import has_nvlink, hidden_gpus

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "hydra-core",
    "numpy",
)


def inspect_packages() -> Iterator[Finding]:
    """Compare installed versions with the requirements."""
    unmet = find_unmet_requirements()
    for requirement, version in unmet:
        yield Finding(
            what="packages",
            state="bad",
            message=f"{requirement} is needed, {version or 'none'} is installed",
            command=f"pip install '{requirement}'",
        )
    if not unmet:
        versions = {name: installed_version(name) for name in PACKAGES}
        shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        yield Finding(what="packages", state="ok", message=shown)


def find_unmet_requirements() -> list[tuple[str, str | None]]:
    """Return each unmet requirement with the installed version (None: not installed)."""
    unmet = []
    for text in metadata.requires("llmtune") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            unmet.append((f"{requirement.name}{requirement.specifier}", version))
    return unmet


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def inspect_cuda() -> Iterator[Finding]:
    """Tell which GPUs torch can use, or why it cannot use those of this machine."""
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        linked = count == 1 or has_nvlink()
        links = "NVLink" if linked else "no NVLink: gathers go over PCIe"
        yield Finding(
            what="GPUs",
            state="ok",
            message=f"{count} x {torch.cuda.get_device_name(0)}, NCCL {nccl}, {links}",
        )
        return
    hidden = hidden_gpus()
    if hidden is None:
        yield Finding(
            what="CUDA",
            state="ok",
            message="no NVIDIA GPU that this process may use; ranks run on the CPU through gloo",
        )
        return
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is built for CPUs"
    else:
        reason = (
            f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot use it:"
            " usually the driver is older than that CUDA version"
        )
    yield Finding(
        what="CUDA",
        state="bad",
        message=f"there is {hidden}, but {reason}",
        command="bash scripts/setup.sh",
    )


def inspect_compiler() -> Iterator[Finding]:
    """Look for what DeepSpeed needs to compile its ops: g++, ninja, Python's headers and libaio."""
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append("python3-dev")
    if missing:
        packages = " ".join("ninja-build" if name == "ninja" else name for name in missing)
        yield Finding(
            what="compiler",
            state="bad",
            message=f"missing: {', '.join(missing)}; DeepSpeed compiles its ops",
            command=f"apt-get install {packages}",
        )
    else:
        yield Finding(what="compiler", state="ok", message="g++, ninja and Python's headers")
    if has_libaio():
        yield Finding(what="libaio", state="ok", message="headers are installed")
    else:
        yield Finding(
            what="libaio",
            state="note",
            message="not installed: offload to NVMe does not work",
            command="apt-get install libaio-dev",
        )
