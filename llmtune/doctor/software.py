"""Findings about installed software: Python packages, CUDA, and the compiler of DeepSpeed's ops."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llmtune.doctor.finding import Finding
from llmtune.doctor.versions import (
    TRIED_DEEPSPEED,
    find_bad_pairs,
    find_unmet_requirements,
    installed_version,
)
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
    """Compare installed versions with the requirements and with pairs that are known to break."""
    versions = {name: installed_version(name) for name in PACKAGES}
    unmet = find_unmet_requirements()
    for requirement, version in unmet:
        yield Finding(
            what="packages",
            state="bad",
            message=f"{requirement} is needed, {version or 'none'} is installed",
            command=f"pip install '{requirement}'",
        )
    pairs = find_bad_pairs(versions)
    for pair in pairs:
        first = f"{pair.first} {versions[pair.first]}"
        second = f"{pair.second} {versions[pair.second]}"
        yield Finding(
            what="packages",
            state="bad",
            message=f"{first} with {second}: {pair.symptom}",
            command=pair.command,
        )
    deepspeed = versions["deepspeed"] or ""
    if deepspeed and not deepspeed.startswith(TRIED_DEEPSPEED):
        yield Finding(
            what="packages",
            state="note",
            message=f"deepspeed {deepspeed}: plan and fixes were tested with {TRIED_DEEPSPEED}",
            command="pip install 'deepspeed>=0.19.8,<0.20'",
        )
    if not unmet and not pairs:
        shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        yield Finding(what="packages", state="ok", message=shown)


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
