"""Memory that CUDA's driver moves between a GPU and the host, for the states of an optimizer.

The driver moves pages of it to the host when the GPU has no memory left for something else, and
back when a kernel reads them. torch's allocator has no such memory; bitsandbytes makes it, and
gives tensors of the CPU on it, on which no kernel of CUDA works. Here a tensor of the GPU is put on
the same bytes.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch

#: Codes of numpy's array interface.
_TYPES = {torch.uint8: "|u1", torch.float32: "<f4"}


class ManagedMemory:
    """Bytes of ``cudaMallocManaged``, in the form in which torch takes them.

    See https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html. They are freed with
    the process, as bitsandbytes has no function that frees them.
    """

    def __init__(self, address: int, shape: tuple[int, ...], dtype: torch.dtype):
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": shape,
            "typestr": _TYPES[dtype],
            "data": (address, False),
            "strides": None,
            "version": 2,
        }


def paged_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros on a device; on a GPU in memory that the driver may move to the host.

    Args:
        dtype: ``torch.uint8`` or ``torch.float32``.

    Raises:
        MemoryError: GPU and host together have not so much.
    """
    if device.type != "cuda":
        return torch.zeros(shape, dtype=dtype, device=device)
    from bitsandbytes import functional

    with torch.cuda.device(device):
        size = math.prod(shape) * dtype.itemsize
        address = functional.lib.cget_managed_ptr(ctypes.c_size_t(size))
        if not address:
            raise MemoryError(f"CUDA gives no {size} bytes of managed memory")
        memory = ManagedMemory(address, shape, dtype)
        return torch.as_tensor(memory, device=device).zero_()
