"""A pretend GPU on which DeepSpeed and llmtune run: device, communicator, and DeepSpeed's own
accelerator of CUDA.

Its semantics are in ``device.cpp``. :func:`register` puts it into this process;
``inside/sitecustomize.py`` does so in processes of the command line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from llmtune.launch.launchers.environment import extensions_dir, use_own_ninja

NAME = "pretend"
BACKEND = "pretend_ccl"
#: Bytes of a device where nothing limits it: those of the plan's table of cards are real ones.
MEMORY = 80 * 2**30

_HERE = Path(__file__).parent
_device: Any = None


def load_device() -> Any:
    """The compiled device (25 s once an environment), registered as torch's private device."""
    global _device
    if _device is not None:
        return _device
    from torch.utils.cpp_extension import load

    use_own_ninja()
    folder = extensions_dir() / "llmtune_pretend_gpu"
    folder.mkdir(parents=True, exist_ok=True)
    _device = load(
        "llmtune_pretend_gpu",
        [str(_HERE / "device.cpp")],
        extra_cflags=["-O1"],
        build_directory=str(folder),
    )
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module(_device))
    # ``Module.to`` keeps parameters and what hangs on them, as it does between a CPU and CUDA:
    # torch's way of doing that knows its own devices only, and the other way refuses parameters
    # that somebody refers to.
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.utils.swap_tensors = torch._C._swap_tensor_impl
    torch.utils.generate_methods_for_privateuse1_backend(unsupported_dtype=[torch.quint8])
    return _device


def register() -> Any:
    """Device, collectives, and the accelerator that DeepSpeed asks; the compiled device, whose
    counters a test may read.
    """
    device = load_device()
    if NAME not in dist.Backend.backend_type_map:
        from tests.cuda.pretend.group import make_group

        dist.Backend.register_backend(BACKEND, make_group, devices=[NAME])
    if limit := os.environ.get("PRETEND_PINNED"):
        device.limit(-1, int(limit))
    from deepspeed.accelerator import real_accelerator

    if getattr(real_accelerator.ds_accelerator, "_name", None) != NAME:
        real_accelerator.ds_accelerator = accelerator_of_cuda()
    return device


def accelerator_of_cuda() -> Any:
    """DeepSpeed's accelerator of CUDA, its own source, with the pretend device in the place of
    ``torch.cuda``.
    """
    from deepspeed.accelerator import cuda_accelerator

    source = Path(cuda_accelerator.__file__).read_text()
    for old, new in (
        ("import torch.cuda", "import torch"),
        ("torch.cuda", f"torch.{NAME}"),
        ("'cuda'", f"'{NAME}'"),
        ("'cuda:{}'", f"'{NAME}:{{}}'"),
        ("'nccl'", f"'{BACKEND}'"),
        ("startswith('cuda:')", f"startswith('{NAME}:')"),
    ):
        source = source.replace(old, new)
    module = ModuleType("deepspeed.accelerator.pretend_accelerator")
    module.__package__ = "deepspeed.accelerator"
    exec(compile(source, "pretend_accelerator.py", "exec"), module.__dict__)
    return module.__dict__["CUDA_Accelerator"]()


def _module(device: Any) -> ModuleType:
    """``torch.pretend``, with what is used of ``torch.cuda``."""
    module = ModuleType(f"torch.{NAME}")

    def index(which: Any = None) -> int:
        if which is None:
            return int(device.current_device())
        if isinstance(which, int):
            return which
        number = torch.device(which).index
        return int(device.current_device()) if number is None else number

    @contextmanager
    def on_device(which: Any) -> Iterator[None]:
        before = device.current_device()
        device.set_device(index(which))
        try:
            yield
        finally:
            device.set_device(before)

    @contextmanager
    def on_stream(stream: Any) -> Iterator[None]:
        if stream is None:
            yield
            return
        before = torch.accelerator.current_stream(stream.device)
        torch.accelerator.set_stream(stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)

    def make_stream(device: Any = None, priority: int = 0) -> torch.Stream:
        return torch.Stream(torch.device(NAME, index(device)), priority=priority)

    def make_event(
        enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> torch.Event:
        return torch.Event(NAME, enable_timing=enable_timing)

    def properties(which: Any = None) -> SimpleNamespace:
        return SimpleNamespace(
            name="NVIDIA Pretend",
            total_memory=_total_memory(),
            major=9,
            minor=0,
            uuid=f"p-{index(which)}",
        )

    shares: dict[int, float] = {}

    def limit(fraction: float, which: Any = None) -> None:
        shares[index(which)] = fraction
        device.limit(index(which), int(fraction * _total_memory()))

    memory = {
        "memory_allocated": lambda which=None: device.memory(index(which))[0],
        "max_memory_allocated": lambda which=None: device.memory(index(which))[1],
        "memory_reserved": lambda which=None: device.memory(index(which))[0],
        "max_memory_reserved": lambda which=None: device.memory(index(which))[1],
        "memory_stats": lambda which=None: {
            "allocated_bytes.all.peak": device.memory(index(which))[1]
        },
        "reset_peak_memory_stats": lambda which=None: device.reset_peak(index(which)),
        "mem_get_info": lambda which=None: (
            _total_memory() - device.memory(index(which))[0],
            _total_memory(),
        ),
        "get_device_properties": properties,
        "get_device_name": lambda which=None: properties(which).name,
        "set_per_process_memory_fraction": limit,
        "get_per_process_memory_fraction": lambda which=None: shares.get(index(which), 1.0),
        "empty_cache": lambda: None,
    }
    # Kernels are the CPU's, and so are their random numbers.
    random = {
        "get_rng_state": lambda which=None: torch.get_rng_state(),
        "set_rng_state": lambda state, which=None: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "initial_seed": torch.initial_seed,
    }
    rest = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda call: call(),
        "device_count": device.device_count,
        "current_device": device.current_device,
        "set_device": lambda which: device.set_device(index(which)),
        "device": on_device,
        "synchronize": lambda which=None: device.synchronize(),
        "Stream": make_stream,
        "Event": make_event,
        "stream": on_stream,
        "current_stream": lambda which=None: torch.accelerator.current_stream(
            torch.device(NAME, index(which))
        ),
        "default_stream": lambda which=None: torch.accelerator.current_stream(
            torch.device(NAME, index(which))
        ),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_capability": lambda which=None: (9, 0),
        "is_current_stream_capturing": lambda: False,
        "nccl": SimpleNamespace(version=lambda: (2, 27, 5)),
    }
    for name, value in {**memory, **random, **rest}.items():
        setattr(module, name, value)
    return module


def show_gpus() -> None:
    """Have llmtune's planning see them, as cards that it knows."""
    from llmtune.plan.devices import gpus, probe

    card = gpus.Gpu("NVIDIA A100-SXM4-80GB", _total_memory(), 80)
    count = int(os.environ.get("PRETEND_DEVICES", 2))
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        count = min(count, len(visible.split(",")))
    for module in (gpus, probe):
        patch.object(module, "visible_gpus", lambda: [card] * count).start()
    patch.object(probe, "check_kernels", lambda gpu: None).start()


def _total_memory() -> int:
    return int(os.environ.get("PRETEND_MEMORY", MEMORY))


def init_process_group(timeout: float = 60) -> None:
    """Ranks whose only group is that of the pretend devices, as NCCL's is of GPUs."""
    torch.get_device_module(NAME).set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(BACKEND, timeout=timedelta(seconds=timeout))
