"""Memory that CUDA's driver moves: here a driver that gives memory of the C library, since there is
no card.
"""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional

from llmtune.engine.paged_memory import ManagedMemory, paged_zeros

GPU = torch.device("cuda", 1)


class Driver:
    """Stands for bitsandbytes' library; memory is full of ones before it is zeroed."""

    def __init__(self, has_memory: bool = True):
        self.has_memory = has_memory
        self.given: list[Any] = []

    def cget_managed_ptr(self, size: ctypes.c_size_t) -> int | None:
        # A number of Python would be cut to 32 bits.
        assert isinstance(size, ctypes.c_size_t)
        if not self.has_memory:
            return None
        self.given.append((ctypes.c_ubyte * size.value)(*[255] * size.value))
        return ctypes.addressof(self.given[-1])


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(functional, "lib", made)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())

    def as_tensor(memory: ManagedMemory, device: torch.device) -> torch.Tensor:
        assert device == GPU
        # The two interfaces differ in whose memory it is, and in the version.
        interface = {**memory.__cuda_array_interface__, "version": 3}
        return torch.from_numpy(np.asarray(SimpleNamespace(__array_interface__=interface)))

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    return made


@pytest.mark.parametrize(
    ("shape", "dtype", "size"),
    [((3, 256), torch.uint8, 768), ((5,), torch.float32, 20), ((1, 256), torch.uint8, 256)],
)
def test_a_tensor_is_on_the_drivers_bytes(
    shape: tuple[int, ...], dtype: torch.dtype, size: int, driver: Driver
) -> None:
    tensor = paged_zeros(shape, dtype, GPU)
    assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
    assert not tensor.any()
    (memory,) = driver.given
    assert len(memory) == size
    tensor.fill_(1)
    assert bytes(memory) == bytes(tensor.numpy().tobytes())


def test_memory_that_is_not_there_is_said(driver: Driver) -> None:
    driver.has_memory = False
    with pytest.raises(MemoryError, match="768 bytes"):
        paged_zeros((3, 256), torch.uint8, GPU)


def test_memory_of_the_host_is_not_paged(driver: Driver) -> None:
    assert paged_zeros((3, 256), torch.uint8, torch.device("cpu")).sum() == 0
    assert driver.given == []
