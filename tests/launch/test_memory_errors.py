"""Whose memory ran out, in the words of every library that can run out of it."""

from __future__ import annotations

import pytest
import torch

from llmtune.errors import CheckpointError
from llmtune.launch.supervise.out_of_memory import memory_pool, memory_pool_of_text

DEVICE = [
    (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of"
        " which 1.06 GiB is free."
    ),
    "HIP out of memory. Tried to allocate 20.00 MiB",
    (
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some"
        " other API call"
    ),
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    (
        "NCCL error in: ProcessGroupNCCL.cpp:268, unhandled cuda error\nLast error:\nCuda failure 2"
        " 'out of memory'"
    ),
    "Failed to CUDA calloc async 608 bytes, Cuda failure 2 'out of memory'",
    "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    (
        "[rank0]: torch.OutOfMemoryError: Allocation on device 0 would exceed allowed memory. (out"
        " of memory)"
    ),
]

HOST = [
    (
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory:"
        " you tried to allocate 4 bytes."
    ),
    "not enough memory: you tried to allocate 107374182400 bytes.",
    "std::bad_alloc",
    "could not create a primitive",
    "could not create a memory object",
    "could not create a memory storage",
    "could not initialize a memory object",
    "[Errno 12] Cannot allocate memory",
    "unable to mmap 4096 bytes from file </dev/shm/torch_1>: Cannot allocate memory (12)",
    "malloc of size 12884901888 failed",
    "realloc of size 4096 failed",
    "memory allocation of 1024 bytes failed",
    "Unable to allocate 1.00 GiB for an array with shape (134217728,) and data type float64",
    "libgomp: Thread creation failed: Resource temporarily unavailable",
    "can't start new thread",
    "DataLoader worker (pid 4711) is killed by signal: Killed.",
    (
        "DataLoader worker (pid 4711) is killed by signal: Bus error. It is possible that"
        " dataloader's workers are out of shared"
    ),
    "unable to write to file </torch_4711_0>: No space left on device (28)",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "Caught OutOfMemoryError in pin memory thread for device 0. CUDA error: out of memory",
    "cudaHostAlloc failed: CUDA error: out of memory",
    "Out of memory",
]

NEITHER = [
    "Connection closed by peer",
    "CUDA error: device-side assert triggered",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSetStream(handle, stream)`",
    "NCCL error: unhandled system error, No space left on device: /tmp/nccl-log",
    "[Errno 28] No space left on device: 'checkpoint-3/model.safetensors'",
    "could not create a primitive descriptor for a matmul primitive",
    "cannot allocate memory in static TLS block",
    "DataLoader worker (pid 4711) is killed by signal: Segmentation fault.",
    "out of resource: shared memory, Required: 262144, Hardware limit: 232448",
    "Expected all tensors to be on the same device",
]


@pytest.mark.parametrize("text", DEVICE)
def test_words_of_a_gpu(text: str) -> None:
    assert memory_pool(RuntimeError(text)) == "device"


@pytest.mark.parametrize("text", HOST)
def test_words_of_the_host(text: str) -> None:
    assert memory_pool(RuntimeError(text)) == "host"
    assert memory_pool_of_text(text.splitlines()[0]) == "host"


@pytest.mark.parametrize("text", NEITHER)
def test_words_of_something_else(text: str) -> None:
    assert memory_pool(RuntimeError(text)) is None


def test_kinds_of_exceptions_need_no_words() -> None:
    assert memory_pool(torch.OutOfMemoryError("x")) == "device"
    assert memory_pool(MemoryError()) == "host"
    assert memory_pool(CheckpointError("out of memory")) is None


def test_pinned_memory_that_cuda_could_not_get_is_the_hosts() -> None:
    def pin_memory() -> None:
        raise RuntimeError(DEVICE[2])

    with pytest.raises(RuntimeError) as caught:
        pin_memory()
    assert memory_pool(caught.value) == "host"


def test_the_cause_behind_an_error_counts() -> None:
    outer = ValueError("the layer failed")
    outer.__cause__ = RuntimeError(DEVICE[0])
    assert memory_pool(outer) == "device"
