"""Memory that ran out, told by an exception or by the words of the library that could not get it,
and whose memory it was.

torch's CUDA allocator raises an exception of its own. Everybody else raises a plain
``RuntimeError`` or aborts, so that the words are all there is; they are those of the libraries'
sources.
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
            # cuBLAS makes its handle and workspace when it is first called; with no memory left it
            # cannot.
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
            # oneDNN has no word for it: what it makes first is its memory.
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
            # A worker of torch's loader, whom the kernel chose, or whose batches filled it.
            r"DataLoader worker \(pid.*\) is killed by signal: (?:Killed|Bus error)",
            r"CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
            r"\b[Oo]ut of memory\b",
        )
    )
)

# : Page-locked memory is the host's, but CUDA hands it out, in the words of a device. These
# functions ask for it.
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
    """``device`` or ``host``, whose memory ran out; None where something else went wrong."""
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
    """The same of what a process printed before it was gone."""
    if _DEVICE.search(text):
        return "host" if _PINNING_WORDS.search(text) else "device"
    return "host" if _HOST.search(text) else None
