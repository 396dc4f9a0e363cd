"""Runs inside every process of a run under test: notes what the ranks do, slows it, and holds it at
gates.

Its folder is on ``PYTHONPATH``, so that Python imports it at start-up. It changes no result: it
only sleeps around functions of the product, which it wraps as their modules are imported, or raises
in their place.

    FAULT_DIR     folder of ``trace-<rank>-<pid>.jsonl`` and of gates
    FAULT_SLOW    JSON: point -> seconds slept there, each time
    FAULT_GATES   JSON: points; the first process to come to one writes ``at <point>`` and waits for
    ``open <point>``
    FAULT_MEMORY  ``7@1``: rank 1 runs out of memory in step 7, once
    FAULT_MIRROR  a folder: ``broken://`` of fsspec writes to it, and its first
    FAULT_MIRROR_FAILURES uploads fail

Points are ``start``, ``prepare`` (in the supervisor), ``load``, ``step:7``, ``evaluate:8``,
``save:12``, ``file:12:manifest.json`` (before it is written), and ``write:12`` (every tensor and
every flush of the save of step 12).
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import json
import os
import re
import select
import sys
import time
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_FOLDER = os.environ.get("FAULT_DIR")
_RANK = os.environ.get("RANK", "supervisor")
_SLOW: dict[str, float] = json.loads(os.environ.get("FAULT_SLOW", "{}"))
_GATES: list[str] = json.loads(os.environ.get("FAULT_GATES", "[]"))
_STEP_OF_PATH = re.compile(r"checkpoint-(\d+)")


def note(event: str, step: int | None = None) -> None:
    """One line of this process's trace."""
    line = {
        "time": time.monotonic(),
        "event": event,
        "step": step,
        "rank": _RANK,
        "pid": os.getpid(),
    }
    file = Path(str(_FOLDER)) / f"trace-{_RANK}-{os.getpid()}.jsonl"
    with file.open("a") as out:
        out.write(json.dumps({**line, "port": os.environ.get("MASTER_PORT")}) + "\n")


def reach(point: str) -> None:
    """Sleep where that is asked for; wait at a gate that nobody has reached before."""
    time.sleep(_SLOW.get(point, _SLOW.get(f"{point.split(':')[0]}:*", 0.0)))
    # A gate may name the rank that is to wait there.
    for gate in (point, f"{point}@{_RANK}"):
        if gate in _GATES:
            _wait_at(gate)


def _wait_at(gate: str) -> None:
    name = gate.replace("/", "_")
    try:
        os.close(os.open(f"{_FOLDER}/at {name}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    while not Path(f"{_FOLDER}/open {name}").exists():
        time.sleep(0.005)


def _run_out_of_memory(module: Any, step: int) -> None:
    """Let the forward pass raise what torch's allocator raises, where that is asked for."""
    if os.environ.get("FAULT_MEMORY") != f"{step}@{module.rank.rank}":
        return
    try:
        os.close(os.open(f"{_FOLDER}/out of memory", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return

    def refuse(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    module.model.register_forward_pre_hook(refuse)


def _step_of(path: Any) -> int | None:
    match = _STEP_OF_PATH.search(str(path))
    return int(match[1]) if match else None


def _before_file(path: Any) -> None:
    step = _step_of(path)
    if step is not None:
        reach(f"file:{step}:{Path(path).name}")


def _before(function: Callable[..., Any], act: Callable[..., None]) -> Callable[..., Any]:
    """``function``, with ``act`` called on the same arguments ahead of it."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        act(*arguments, **named)
        return function(*arguments, **named)

    return wrapped


def _patch_module(module: Any) -> None:
    """``llmtune.engine.train_module``: steps and evaluations."""
    train_step, evaluate = module.TrainModule.train_step, module.TrainModule.evaluate

    @functools.wraps(train_step)
    def slow_step(self: Any, *arguments: Any, **named: Any) -> Any:
        step = self.rank.phases.step
        note("step", step)
        reach(f"step:{step}")
        _run_out_of_memory(self, step)
        result = train_step(self, *arguments, **named)
        note("stepped", step)
        return result

    @functools.wraps(evaluate)
    def slow_evaluate(self: Any, batches: Any, *arguments: Any, **named: Any) -> Any:
        step = self.rank.phases.step
        note("evaluate", step)

        def slowed() -> Any:
            for number, batch in enumerate(batches):
                if number == 1:
                    reach(f"evaluate:{step}")
                yield batch

        result = evaluate(self, slowed(), *arguments, **named)
        note("evaluated", step)
        return result

    module.TrainModule.train_step, module.TrainModule.evaluate = slow_step, slow_evaluate


def _patch_tensor_file(module: Any) -> None:
    """``llmtune.storage.tensors.safetensors_writer``: the large files."""
    kind = module.TensorFile
    kind.__init__ = _before(kind.__init__, lambda _, path, *rest, **named: _before_file(path))
    kind.write = _before(kind.write, lambda self, _: reach(f"write:{_step_of(self.path)}"))


def _patch_manifest(module: Any) -> None:
    """``llmtune.storage.manifest``: the manifest and the marker."""
    module.write_manifest = _before(
        module.write_manifest, lambda folder, *rest, **named: _before_file(folder / "manifest.json")
    )
    module.mark_complete = _before(
        module.mark_complete, lambda folder: _before_file(folder / "COMPLETE")
    )


def _patch_atomic(module: Any) -> None:
    """``llmtune.storage.atomic``: what is flushed."""
    module.flush = _before(module.flush, lambda path: reach(f"write:{_step_of(path)}"))


def _patch_save(module: Any) -> None:
    """``llmtune.checkpoint.save``: the small files, beginning and end."""
    publish = module.publish

    def write(path: Path, data: Any) -> None:
        _before_file(path)
        reach(f"write:{_step_of(path)}")

    module.write_atomically = _before(module.write_atomically, write)

    def begin(own: Any, request: Any, *rest: Any) -> None:
        step = request.state.step
        note("save", step)
        reach(f"save:{step}")

    def noted_publish(aside: Path, folder: Path) -> None:
        publish(aside, folder)
        note("saved", _step_of(folder))

    module.begin_save = _before(module.begin_save, begin)
    module.publish = noted_publish


def _patch_job(module: Any) -> None:
    """``llmtune.train.builders.job``: the model is being built."""

    def begin(*_: Any, **__: Any) -> None:
        note("load")
        reach("load")

    module.build_module = _before(module.build_module, begin)


def _patch_resume(module: Any) -> None:
    """``llmtune.train.resume``: the supervisor prepares a start."""
    module.resume_point = _before(module.resume_point, lambda *_, **__: reach("prepare"))


def _patch_mirror(module: Any) -> None:
    """``llmtune.storage.remote``: a store that fails."""
    if "FAULT_MIRROR" not in os.environ:
        return
    import fsspec
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    failures = [int(os.environ["FAULT_MIRROR_FAILURES"])]

    class BrokenFileSystem(DirFileSystem):  # type: ignore[misc]
        """A folder whose first writes fail."""

        protocol = "broken"

        def __init__(self, **options: Any):
            options.pop("path", None)
            super().__init__(path=os.environ["FAULT_MIRROR"], fs=LocalFileSystem(), **options)

        def open(self, path: str, mode: str = "rb", *rest: Any, **named: Any) -> Any:
            if "w" in mode and failures[0] > 0 and "checkpoint-" in path:
                failures[0] -= 1
                note(f"mirror fails at {path}")
                raise OSError(5, "the network is down (a test)")
            return super().open(path, mode, *rest, **named)

    fsspec.register_implementation("broken", BrokenFileSystem, clobber=True)


_PATCHES: dict[str, Callable[[Any], None]] = {
    "llmtune.engine.train_module": _patch_module,
    "llmtune.storage.tensors.safetensors_writer": _patch_tensor_file,
    "llmtune.storage.atomic": _patch_atomic,
    "llmtune.storage.manifest": _patch_manifest,
    "llmtune.checkpoint.save": _patch_save,
    "llmtune.storage.remote": _patch_mirror,
    "llmtune.train.builders.job": _patch_job,
    "llmtune.train.resume": _patch_resume,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds what the others find, and patches it when it was executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        patch = _PATCHES.get(name)
        if patch is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            patch(module)

        loader.exec_module = execute_and_patch
        return spec


def _is_of_the_run() -> bool:
    """Not in compilers, wrappers and other Python programs that a process starts."""
    return any(word in ("llmtune", "llmtune.run.rank") for word in sys.orig_argv)


def _sleep(seconds: float) -> None:
    """``time.sleep``, which fails under libfaketime 0.9.10 when the monotonic clock is not faked
    (``clock_nanosleep``).
    """
    select.select([], [], [], seconds)


if "libfaketime" in os.environ.get("LD_PRELOAD", ""):
    time.sleep = _sleep  # type: ignore[assignment]

if _FOLDER and _is_of_the_run():
    note("start")
    sys.meta_path.insert(0, _Finder())
    if _RANK != "supervisor":
        reach("start")
