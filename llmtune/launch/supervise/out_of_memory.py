"""Recognize that memory ran out in a rank, and whether it was the device's or the host's.

torch's CUDA allocator raises its own class of exception. All others raise a plain ``RuntimeError``
or abort, so that only the message tells; the patterns follow the libraries' sources.
"""

import re
import signal
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

from llmtune.errors import DoesNotFitError, LlmtuneError
from llmtune.storage.rank_files import FailureReport, KernelKills, read_phase


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEvent:
    """Memory that ran out, and where."""

    rank: int
    phase: str
    """The rank's phase: one of ``start load answer forward backward step evaluate save``."""
    step: int
    """The optimizer step under way; 0 before the first."""
    peak_bytes: int
    """Peak in the rank's last record: resident on the host, or allocated on the GPU by torch."""
    pool: str
    """``device`` or ``host``."""
    message: str

    def describe(self) -> str:
        """Describe the event in one sentence."""
        where = f"in {self.phase}" + (f" of step {self.step}" if self.step else "")
        return (
            f"out of {self.pool} memory {where} (rank {self.rank}):"
            f" {self.message.splitlines()[0][:200]}"
        )


class RanOutOfMemoryError(DoesNotFitError):
    """A rank ran out of memory."""

    def __init__(self, event: MemoryEvent):
        super().__init__(event.describe())
        self.event = event


def count_kills() -> KernelKills:
    """Ask the kernel how many processes its OOM killer has ended."""
    total = 0
    for path, key in (("/proc/vmstat", "oom_kill"), ("/sys/fs/cgroup/memory.events", "oom_kill")):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.split()[0] == key)
    return KernelKills(total)


def find_event(
    codes: list[int | None],
    first_failed: int | None,
    reports: list[FailureReport],
    folder: Path,
    output: str,
) -> MemoryEvent | None:
    """Return the event, if memory is what ended the ranks.

    Args:
        codes: Exit codes of the ranks.
        first_failed: The rank that ended first.
        reports: What ranks reported themselves.
        folder: Of the attempt's :mod:`~llmtune.storage.rank_files`.
        output: What the ranks printed.
    """
    for report in reports:
        if report.out_of_memory is not None:
            message = report.message.removeprefix("out of memory: ")
            return _event(folder, report.rank, report.out_of_memory, message)
    if (
        first_failed is not None
        and codes[first_failed] == -signal.SIGKILL
        and count_kills().count > KernelKills.read(folder).count
    ):
        return _event(folder, first_failed, "host", "the kernel ended the process")
    said = next(
        (line for line in output.splitlines() if memory_pool_of_text(line) is not None), None
    )
    for rank, code in enumerate(codes):
        if said is not None and code not in (0, None, -signal.SIGKILL, -signal.SIGTERM):
            return _event(folder, rank, memory_pool_of_text(said) or "host", said.strip())
    return None


def find_own_event(error: BaseException, folder: Path, rank: int) -> MemoryEvent | None:
    """Return the event of an error in this rank itself; None where it is about something else.

    Args:
        folder: That of this rank's :class:`~llmtune.storage.phase_record.PhaseRecord`, which is
            there as that of rank 0.
    """
    pool = memory_pool(error)
    if pool is None:
        return None
    message = str(error).strip() or type(error).__name__
    return replace(_event(folder, 0, pool, message), rank=rank)


def event_at_limit(folder: Path, rank: int, message: str) -> MemoryEvent | None:
    """Return the event that may have ended a rank near its memory limit, whatever it reported."""
    event = _event(folder, rank, "host", message)
    pool = read_phase(folder, rank).at_limit
    return replace(event, pool=pool) if pool else None


def _event(folder: Path, rank: int, pool: str, message: str) -> MemoryEvent:
    record = read_phase(folder, rank)
    peak = record.device_peak_bytes if pool == "device" else record.peak_bytes
    return MemoryEvent(
        rank=rank,
        phase=record.phase,
        step=record.step,
        peak_bytes=peak,
        pool=pool,
        message=message,
    )


#: Memory of a GPU.
_DEVICE = re.compile(
    "|".join(
        (
            r"(?:CUDA|HIP|XPU) out of memory|torch\.(?:cuda\.)?OutOfMemoryError",
            # Of the CUDA runtime and driver, and through NCCL: "Cuda failure 2 'out of memory'".
            r"(?i:(?:cuda|hip|nccl)\b.*\bout of memory)",
            r"cudaErrorMemoryAllocation|hipErrorOutOfMemory|CUDA_ERROR_OUT_OF_MEMORY",
            r"CU(?:BLAS|SOLVER|SPARSE|FFT)(?:LT)?_(?:STATUS_)?ALLOC_FAILED",
            # cuBLAS allocates its handle and workspace at its first call.
            r"CUBLAS_STATUS_NOT_INITIALIZED.*cublasCreate",
            r"CUDNN_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        )
    )
)

#: Memory of the host.
_HOST = re.compile(
    "|".join(
        (
            # torch's allocator, the C++ library, the kernel (malloc, mmap, fork), numpy, Arrow,
            # Rust's tokenizers, OpenMP.
            r"can't allocate memory|not enough memory: you tried to allocate",
            r"std::bad_alloc|Cannot allocate memory|unable to mmap|posix_memalign",
            r"Unable to allocate .* for an array",
            (
                r"(?:malloc|realloc|calloc) of size \d+ failed|Out of memory: malloc|memory"
                r" allocation of \d+ bytes failed"
            ),
            (
                r"Thread creation failed|can't start new thread|Resource temporarily"
                r" unavailable.*(?:thread|fork)"
            ),
            # oneDNN does not name memory: what it fails to create needs memory first.
            (
                r"could not create a (?:primitive|memory object|memory storage|scratchpad)(?!"
                r" descriptor)"
            ),
            r"could not (?:initialize a memory object|reserve memory)",
            # /dev/shm, which is memory.
            (
                r"(?:unable to (?:write to|resize|allocate).*(?:torch_|shm)|shared memory).*No"
                r" space left on device"
            ),
            # A worker of torch's loader that the kernel killed, or whose batches filled /dev/shm.
            r"DataLoader worker \(pid.*\) is killed by signal: (?:Killed|Bus error)",
            r"CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
            r"\b[Oo]ut of memory\b",
        )
    )
)

#: Functions that allocate page-locked memory: it is the host's, but CUDA allocates it, and reports
#: a failure as that of a device.
_PINNING = {
    "pin_memory",
    "pin",
    "pin_empty",
    "pin_empty_like",
    "_pin_fresh",
    "_torch_pin_memory",
    "_torch_empty_pinned",
}
_PINNING_WORDS = re.compile(r"pin memory thread|cudaHostAlloc|cudaHostRegister|hipHostMalloc")


def memory_pool(error: BaseException) -> str | None:
    """Return whose memory ran out, ``device`` or ``host``; None for any other error."""
    if isinstance(error, LlmtuneError):
        return None
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return "device"
    if isinstance(error, MemoryError):
        return "host"
    pool = memory_pool_of_text(str(error))
    if pool is None and error.__cause__ is not None:
        return memory_pool(error.__cause__)
    frames = traceback.extract_tb(error.__traceback__)
    return "host" if pool == "device" and any(frame.name in _PINNING for frame in frames) else pool


def memory_pool_of_text(text: str) -> str | None:
    """Return the same for the text that a process printed before it ended."""
    if _DEVICE.search(text):
        return "host" if _PINNING_WORDS.search(text) else "device"
    return "host" if _HOST.search(text) else None
