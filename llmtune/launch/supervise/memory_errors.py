"""Recognize out-of-memory errors, and whether device or host memory ran out.

torch's CUDA allocator raises its own class of exception. All others raise a plain ``RuntimeError``
or abort, so that only the message tells; the patterns follow the libraries' sources.
"""

from __future__ import annotations

import re
import traceback

from llmtune.errors import LlmtuneError

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
