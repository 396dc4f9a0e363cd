"""Findings about what a run draws on: limits, memory, shared memory, disks and tokens."""

import functools
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from llmtune.doctor.finding import Finding, remove_files
from llmtune.units import format_bytes

#: Free bytes below which a run's first checkpoint or download is likely to fill the disk.
LITTLE_DISK = 10 * 10**9
#: Shared memory that NCCL, gloo and data workers of a node use.
LITTLE_SHM = 10**9
_FEW_FILES = 4096
_LITTLE_LOCKED = 2**30


def inspect_limits() -> Iterator[Finding]:
    """Report the limits of open files and locked memory, and the free memory."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < _FEW_FILES:
        yield Finding(
            what="open files",
            state="note",
            message=f"ulimit -n is {files}; many shards and ranks need more",
            command="ulimit -n 65536",
        )
    else:
        yield Finding(what="open files", state="ok", message=f"ulimit -n is {files}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked != resource.RLIM_INFINITY and locked < _LITTLE_LOCKED:
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
    yield from _inspect_shared_memory()
    memory = psutil.virtual_memory()
    yield Finding(
        what="memory",
        state="ok",
        message=f"{format_bytes(memory.available)} of {format_bytes(memory.total)} free",
    )


def _inspect_shared_memory() -> Iterator[Finding]:
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
        held = format_bytes(sum(file.stat().st_size for file in left))
        yield Finding(
            what="/dev/shm",
            state="note",
            message=f"{len(left)} buffers of ranks that have ended hold {held} of memory",
            command=f"rm {' '.join(map(str, left))}",
            fix=functools.partial(remove_files, left),
        )


def left_shared_buffers() -> list[Path]:
    """Return buffers of DeepSpeed's CPU collectives that no process maps any more."""
    mapped = set()
    for process in psutil.process_iter():
        try:
            mapped |= {Path(region.path) for region in process.memory_maps()}
        except (psutil.Error, OSError):
            continue
    buffers = Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*")
    return sorted(file for file in buffers if file not in mapped)


def inspect_disks(cache: Path) -> Iterator[Finding]:
    """Report free space and access of the folders that runs, caches and downloads go to."""
    folders = {
        "runs": Path.cwd(),
        "cache": cache.expanduser(),
        "model hub cache": Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser(),
    }
    for what, folder in folders.items():
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if not os.access(existing, os.W_OK):
            yield Finding(
                what=what,
                state="bad",
                message=f"{folder} is not writable",
                command=f"chmod u+w {existing}",
            )
        elif free < LITTLE_DISK:
            yield Finding(
                what=what,
                state="note",
                message=f"{folder}: only {format_bytes(free)} free",
                command=f"df -h {existing}",
            )
        else:
            yield Finding(what=what, state="ok", message=f"{folder}: {format_bytes(free)} free")


def inspect_credentials() -> Iterator[Finding]:
    """Report which tokens are set, in the environment or in the files of their own tools."""
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "token"
    present = "HF_TOKEN" in os.environ or hub.is_file()
    yield Finding(
        what="HF_TOKEN",
        state="ok",
        message="present" if present else "absent: gated models (Llama) cannot be downloaded",
    )
    netrc = Path("~/.netrc").expanduser()
    present = "WANDB_API_KEY" in os.environ or (
        netrc.is_file() and "wandb" in netrc.read_text(errors="replace")
    )
    yield Finding(
        what="WANDB_API_KEY",
        state="ok",
        message="present" if present else "absent: tracker=wandb works offline",
    )
