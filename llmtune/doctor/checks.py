"""What on this machine would stop a run, each finding with the command that mends it."""

from __future__ import annotations

import functools
import os
import resource
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from llmtune.doctor.versions import TRIED_DEEPSPEED, bad_pairs, installed, unmet_requirements
from llmtune.launch.launchers.environment import extensions_dir
from llmtune.launch.preflight.deepspeed_ops import (
    build_in_child,
    find_foreign_op,
    has_libaio,
    is_built,
    needed_ops,
    stale_locks,
)
from llmtune.plan.devices.gpus import has_nvlink, hidden_gpus
from llmtune.security.trust import find_owner_problem, owner_command
from llmtune.units import format_bytes

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

#: Free bytes below which a run's first checkpoint or download is likely to fill the disk.
LITTLE_DISK = 10 * 10**9
#: Shared memory that NCCL, gloo and data workers of a node use.
LITTLE_SHM = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: str
    """``ok``, ``note`` (works, but), ``bad`` (stops a run)."""
    message: str
    command: str | None = None
    """What mends it."""
    fix: Callable[[], str | None] | None = None
    """The same, where it is safe to do unasked; returns why it failed, or None."""


def find_all(cache: Path) -> Iterator[Finding]:
    """Every finding, one after the other: some take seconds."""
    yield from _packages()
    yield from _cuda()
    yield from _compiler()
    owners = list(_owners(cache))
    yield from owners
    if all(finding.state != "bad" for finding in owners):
        yield from _locks()
        yield from _ops()
    yield from _limits()
    yield from _disks(cache)
    yield from _tokens()


def _packages() -> Iterator[Finding]:
    versions = {name: installed(name) for name in PACKAGES}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    unmet = unmet_requirements()
    for requirement, version in unmet:
        yield Finding(
            what="packages",
            state="bad",
            message=f"{requirement} is needed, {version or 'none'} is installed",
            command=f"pip install '{requirement}'",
        )
    pairs = bad_pairs(versions)
    for pair in pairs:
        yield Finding(
            what="packages",
            state="bad",
            message=(
                f"{pair.first} {versions[pair.first]} with {pair.second} {versions[pair.second]}:"
                f" {pair.symptom}"
            ),
            command=pair.command,
        )
    deepspeed = versions["deepspeed"] or ""
    if deepspeed and not deepspeed.startswith(TRIED_DEEPSPEED):
        yield Finding(
            what="packages",
            state="note",
            message=(
                f"deepspeed {deepspeed}: plan and corrections were tried with {TRIED_DEEPSPEED}"
            ),
            command="pip install 'deepspeed>=0.19.8,<0.20'",
        )
    if not unmet and not pairs:
        yield Finding(what="packages", state="ok", message=shown)


def _cuda() -> Iterator[Finding]:
    import torch

    build = torch.version.cuda
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        links = (
            "NVLink"
            if torch.cuda.device_count() == 1 or has_nvlink()
            else "no NVLink: gathers go over PCIe"
        )
        yield Finding(
            what="GPUs",
            state="ok",
            message=(
                f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, NCCL {nccl},"
                f" {links}"
            ),
        )
        return
    hidden = hidden_gpus()
    if hidden is None:
        yield Finding(
            what="CUDA",
            state="ok",
            message="no NVIDIA GPU that this process may use; ranks run on the CPU through gloo",
        )
    elif build is None:
        yield Finding(
            what="CUDA",
            state="bad",
            message=f"there is {hidden}, but torch {torch.__version__} is built for CPUs",
            command="bash scripts/setup.sh",
        )
    else:
        yield Finding(
            what="CUDA",
            state="bad",
            message=(
                f"there is {hidden}, but torch {torch.__version__}, built for CUDA {build}, cannot"
                " use it: as a rule the driver is older than the build"
            ),
            command="bash scripts/setup.sh",
        )


def _compiler() -> Iterator[Finding]:
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append("python3-dev")
    packages = {"ninja": "ninja-build"}
    if missing:
        wanted = " ".join(packages.get(name, name) for name in missing)
        yield Finding(
            what="compiler",
            state="bad",
            message=f"missing: {', '.join(missing)}; DeepSpeed compiles its ops",
            command=f"apt-get install {wanted}",
        )
    else:
        yield Finding(what="compiler", state="ok", message="g++, ninja and Python's headers")
    if has_libaio():
        yield Finding(what="libaio", state="ok", message="headers are there")
    else:
        yield Finding(
            what="libaio",
            state="note",
            message="not installed: offload to NVMe does not work",
            command="apt-get install libaio-dev",
        )


def _owners(cache: Path) -> Iterator[Finding]:
    """Whether others may have written what is loaded or believed."""
    extensions = extensions_dir()
    places = {
        "DeepSpeed's compiled ops": find_foreign_op() or extensions,
        "cache": cache,
        "Python": Path(sys.prefix),
    }
    clean = True
    for what, path in places.items():
        problem = find_owner_problem(path) if path.exists() else None
        if problem is not None:
            clean = False
            # Whoever may write to Python's own folder could do worse than change what llmtune then
            # keeps elsewhere.
            state = "note" if what == "Python" else "bad"
            yield Finding(
                what="owners",
                state=state,
                message=f"{what}: {path} {problem}",
                command=owner_command(path),
            )
    for path in dict.fromkeys((extensions, cache)):
        for parent in filter(Path.exists, path.absolute().parents):
            mode = parent.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                clean = False
                message = f"{parent}: everybody may put another folder in the place of {path}"
                yield Finding(
                    what="owners", state="note", message=message, command=f"chmod o-w {parent}"
                )
    if clean:
        yield Finding(
            what="owners",
            state="ok",
            message="compiled ops, cache and Python are this user's or root's",
        )


def _locks() -> Iterator[Finding]:
    found = stale_locks()
    for lock in found:
        yield Finding(
            what="op locks",
            state="note",
            message=(
                f"{lock}: left by a build that was killed; the next run of llmtune removes it,"
                " DeepSpeed alone would hang on it"
            ),
            command=f"rm {lock}",
            fix=functools.partial(_remove, lock),
        )
    if not found:
        yield Finding(what="op locks", state="ok", message=f"none below {extensions_dir()}")


def _ops() -> Iterator[Finding]:
    accelerator = os.environ.get("DS_ACCELERATOR") or _accelerator()
    for name in needed_ops(accelerator, None):
        short = name.removesuffix("Builder")
        if is_built(name):
            yield Finding(what="ops", state="ok", message=f"{short} is compiled")
        else:
            yield Finding(
                what="ops",
                state="note",
                message=(
                    f"{short} is not compiled yet: the first run that needs it waits a minute"
                    " or two"
                ),
                command=f"python -P -m llmtune.launch.preflight.deepspeed_ops {name}",
                fix=functools.partial(build_in_child, name),
            )


def _limits() -> Iterator[Finding]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < 4096:
        yield Finding(
            what="open files",
            state="note",
            message=f"ulimit -n is {files}; many shards and ranks need more",
            command="ulimit -n 65536",
        )
    else:
        yield Finding(what="open files", state="ok", message=f"ulimit -n is {files}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked != resource.RLIM_INFINITY and locked < 2**30:
        yield Finding(
            what="locked memory",
            state="note",
            message=(
                f"ulimit -l is {format_bytes(locked)}: pinned buffers of offload on a GPU machine"
                " may fail"
            ),
            command="ulimit -l unlimited",
        )
    else:
        yield Finding(what="locked memory", state="ok", message="enough for pinned buffers")
    shm = Path("/dev/shm")
    size = shutil.disk_usage(shm).total if shm.is_dir() else 0
    if size < LITTLE_SHM:
        yield Finding(
            what="/dev/shm",
            state="bad",
            message=f"{format_bytes(size)}: collectives of several ranks fail",
            command="docker run --shm-size 16g ...",
        )
    else:
        yield Finding(what="/dev/shm", state="ok", message=format_bytes(size))
    left = left_shared_buffers()
    if left:
        held = sum(file.stat().st_size for file in left)
        yield Finding(
            what="/dev/shm",
            state="note",
            message=(
                f"{len(left)} buffers of ranks that are gone hold {format_bytes(held)} of memory"
            ),
            command=f"rm {' '.join(map(str, left))}",
            fix=functools.partial(_remove_all, left),
        )
    memory = psutil.virtual_memory()
    yield Finding(
        what="memory",
        state="ok",
        message=f"{format_bytes(memory.available)} of {format_bytes(memory.total)} free",
    )


def left_shared_buffers() -> list[Path]:
    """Buffers of DeepSpeed's CPU collectives that no process has mapped any more."""
    mapped = set()
    for process in psutil.process_iter():
        try:
            mapped |= {Path(region.path) for region in process.memory_maps()}
        except (psutil.Error, OSError):
            continue
    found = Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*")
    return sorted(file for file in found if file not in mapped)


def _remove_all(files: list[Path]) -> str | None:
    return next((reason for reason in map(_remove, files) if reason is not None), None)


def _disks(cache: Path) -> Iterator[Finding]:
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    for what, path in {
        "runs": Path.cwd(),
        "cache": cache.expanduser(),
        "model hub cache": hub,
    }.items():
        there = path
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Finding(
                what=what,
                state="bad",
                message=f"{path} is not writable",
                command=f"chmod u+w {there}",
            )
        elif free < LITTLE_DISK:
            yield Finding(
                what=what,
                state="note",
                message=f"{path}: only {format_bytes(free)} free",
                command=f"df -h {there}",
            )
        else:
            yield Finding(what=what, state="ok", message=f"{path}: {format_bytes(free)} free")


def _tokens() -> Iterator[Finding]:
    """Whether they are there; never what they are."""
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "token"
    here = "HF_TOKEN" in os.environ or hub.is_file()
    yield Finding(
        what="HF_TOKEN",
        state="ok",
        message="present" if here else "absent: gated models (Llama) cannot be downloaded",
    )
    netrc = Path("~/.netrc").expanduser()
    here = "WANDB_API_KEY" in os.environ or (
        netrc.is_file() and "wandb" in netrc.read_text(errors="replace")
    )
    yield Finding(
        what="WANDB_API_KEY",
        state="ok",
        message="present" if here else "absent: tracker=wandb works offline",
    )


def _accelerator() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _remove(path: Path) -> str | None:
    try:
        path.unlink()
    except OSError as error:
        return str(error)
    return None


def _run(*command: str) -> str:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=30
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
