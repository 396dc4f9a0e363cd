"""Runs inside every process of llmtune that is to find pretend GPUs: its folder is on
``PYTHONPATH``.

    PRETEND_DEVICES   how many there are
    PRETEND_MEMORY    bytes of each
    PRETEND_PINNED    bytes of the host's memory that a process may pin, where that is limited
    PRETEND_NVML      how many NVML counts, where that is another number

DeepSpeed is given the pretend accelerator as soon as it looks for one, and llmtune's planning is
shown the cards.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


def _register(_: ModuleType) -> None:
    if os.environ.get("DS_ACCELERATOR") != "cpu" and "RANK" in os.environ:
        from tests.cuda import pretend

        pretend.register()


def _show_gpus(_: ModuleType) -> None:
    from tests.cuda import pretend

    pretend.show_gpus()


def _register_always(_: ModuleType) -> None:
    from tests.cuda import pretend

    pretend.register()


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "deepspeed.accelerator.real_accelerator": _register,
    # It limits the memory of a rank before that looks for an accelerator.
    "llmtune.launch.supervise.rank_report": _register,
    "llmtune.plan.devices.probe": _show_gpus,
    # Of ``eval`` and ``chat``, which need no DeepSpeed.
    "llmtune.run.artifact": _register_always,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the others find, and acts when it was executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        act = _PATCHES.get(name)
        spec = (
            importlib.machinery.PathFinder.find_spec(name, path, target)
            if act is not None
            else None
        )
        if act is None or spec is None or spec.loader is None:
            return None
        loader = spec.loader
        execute = loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            act(module)

        loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


def _make_nvml() -> ModuleType:
    """The module, with what llmtune asks it first; whatever else it asks, such a driver does not
    know.
    """
    nvml = ModuleType("pynvml")
    count = int(os.environ.get("PRETEND_NVML", os.environ["PRETEND_DEVICES"]))
    nvml.nvmlInit = lambda: None  # type: ignore[attr-defined]
    nvml.nvmlDeviceGetCount = lambda: count  # type: ignore[attr-defined]
    return nvml


if "PRETEND_DEVICES" in os.environ:
    if "RANK" not in os.environ:
        # torch asks it in ranks, and for more.
        sys.modules["pynvml"] = _make_nvml()
    sys.path.append(str(Path(__file__).parent.parent.parent.parent))
    sys.meta_path.insert(0, _Finder())
    # A test's process may begin with libraries that are imported already.
    for name, act in _PATCHES.items():
        if name in sys.modules:
            act(sys.modules[name])
