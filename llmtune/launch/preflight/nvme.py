"""Probe the NVMe swap folder before any rank starts, and empty it before and after every run."""

import mmap
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llmtune.errors import DoesNotFitError, MissingPrerequisiteError
from llmtune.launch.preflight.deepspeed_ops import build_in_child
from llmtune.plan.devices.probe import resolve_nvme_folder
from llmtune.security.trust import make_own
from llmtune.storage.hashing import sha256_bytes
from llmtune.units import format_bytes

#: Size of the probe's file: enough to measure a rate, too little to wear a drive.
PROBE_BYTES = 64 * 2**20
#: Bytes per second below which a large model's optimizer step takes hours; only a note.
SLOW_BANDWIDTH = 500e6


@dataclass(frozen=True, slots=True)
class DiskProbe:
    """Bytes per second of one stream, without the page cache."""

    read: float
    write: float


def swap_folder(nvme_path: str, run_folder: Path) -> Path:
    """Return the run's own swap folder, because two runs may share a drive."""
    digest = sha256_bytes(str(run_folder.resolve()).encode())[:12]
    return Path(nvme_path).expanduser() / f"llmtune-swap-{digest}"


def make_swap_folder(folder: Path) -> None:
    """Make the folder for weights and moments, which no other user may open.

    Every rank does, because each machine has its own drive.

    Raises:
        MissingPrerequisiteError: A folder of this name belongs to another user.
    """
    make_own(folder, "offload.nvme_path", "take another offload.nvme_path=")


@contextmanager
def hold_swap_folder(folder: Path) -> Iterator[None]:
    """Make an empty folder, and remove it at the end of the block.

    Raises:
        MissingPrerequisiteError: A folder of this name belongs to another user.
    """
    shutil.rmtree(folder, ignore_errors=True)
    make_swap_folder(folder)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def probe_nvme(
    nvme_path: str,
    swap_bytes: int,
    checkpoint_bytes: int,
    run_folder: Path,
    say: Callable[[str], None],
) -> DiskProbe:
    """Check what an NVMe run needs: the op, direct reads and writes, space; measure the rates.

    Args:
        swap_bytes: Swap files of all ranks of this machine.
        checkpoint_bytes: Checkpoints that the run folder will hold at the same time.

    Raises:
        MissingPrerequisiteError: The op does not load, or the file system has no direct I/O.
        DoesNotFitError: There is too little space, on this disk or for the checkpoints.
    """
    folder = resolve_nvme_folder(nvme_path)
    reason = build_in_child("AsyncIOBuilder", say)
    if reason is not None:
        raise MissingPrerequisiteError(
            f"offload on NVMe: DeepSpeed's AsyncIO op does not load ({reason}); run: apt-get"
            " install libaio-dev, then python -m llmtune doctor --fix"
        )
    _check_space(folder, swap_bytes, checkpoint_bytes, run_folder)
    probe = probe_disk(folder)
    say(
        f"NVMe: {folder} ({disk_behind(folder)}) reads {format_bytes(probe.read)}/s, writes"
        f" {format_bytes(probe.write)}/s (one stream, direct); swap {format_bytes(swap_bytes)}"
    )
    if min(probe.read, probe.write) < SLOW_BANDWIDTH:
        say("NVMe: this is slow for a drive; every optimizer step reads and writes all states")
    return probe


def disk_behind(folder: Path) -> str:
    """Name the block device of a folder's file system, such as ``nvme0n1``, and its kind."""
    number = folder.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not device.exists():
        return "no local block device"
    path = device.resolve()
    # A partition has no queue; its disk has one.
    whole = path if (path / "queue").is_dir() else path.parent
    if whole.name.startswith("nvme"):
        return whole.name
    try:
        rotational = (whole / "queue" / "rotational").read_text().strip() == "1"
    except OSError:
        rotational = False
    kind = "rotational according to the kernel" if rotational else "no NVMe drive"
    return f"{whole.name}, {kind}"


def probe_disk(folder: Path) -> DiskProbe:
    """Write and read a file with ``O_DIRECT``, as DeepSpeed's swapper does.

    Raises:
        MissingPrerequisiteError: The file system refuses it (tmpfs and some network file systems
            do).
    """
    # A scratch drive is often open to all users, who could put a link at a name they can guess.
    path = folder / f".llmtune-probe-{uuid.uuid4().hex}"
    block = mmap.mmap(-1, 4 * 2**20)
    block.write(os.urandom(4096) * (len(block) // 4096))
    try:
        write = _time_blocks(
            path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, lambda file: os.write(file, block)
        )
        read = _time_blocks(path, os.O_RDONLY, lambda file: os.readv(file, [block]))
    except OSError as error:
        raise MissingPrerequisiteError(
            f"offload.nvme_path={folder}: no direct I/O here ({error.strerror}); name a folder on a"
            " local disk with ext4 or xfs"
        ) from error
    finally:
        path.unlink(missing_ok=True)
    return DiskProbe(PROBE_BYTES / read, PROBE_BYTES / write)


def _time_blocks(path: Path, flags: int, move: Callable[[int], int]) -> float:
    file = os.open(path, flags | os.O_DIRECT, 0o600)
    started, done = time.perf_counter(), 0
    try:
        while done < PROBE_BYTES:
            done += move(file)
        if flags & os.O_WRONLY:
            os.fsync(file)
    finally:
        os.close(file)
    return time.perf_counter() - started


def _check_space(folder: Path, swap_bytes: int, checkpoint_bytes: int, run_folder: Path) -> None:
    """Compare free space with swap files and checkpoints, added up where they share a disk."""
    if folder.stat().st_dev == run_folder.stat().st_dev:
        needs = [(folder, "swap files and checkpoints", swap_bytes + checkpoint_bytes)]
    else:
        needs = [
            (folder, "swap files", swap_bytes),
            (run_folder, "checkpoints", checkpoint_bytes),
        ]
    for path, what, needed in needs:
        free = shutil.disk_usage(path).free
        if needed > free:
            raise DoesNotFitError(
                f"{path}: {what} need {format_bytes(needed)}, free are {format_bytes(free)}; free "
                f"{format_bytes(needed - free)}, or take another offload.nvme_path= or output_dir="
            )
