"""Build DeepSpeed's ops before ranks need them: ranks that build at once block each other.

``python -m llmtune.launch.preflight.deepspeed_ops`` builds what this machine can use; the set-up
scripts call it.
"""

import contextlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any, TextIO

import psutil

from llmtune.errors import MissingPrerequisiteError
from llmtune.launch.launchers.environment import extensions_dir, set_defaults
from llmtune.plan.memory.placement import Placement
from llmtune.security.trust import find_owner_problem, make_own, open_lock, require_own
from llmtune.storage.lock import try_lock

#: DeepSpeed's builder -> what its op is for.
CPU_OPS = {
    "ShareMemCommBuilder": "collectives of CPU ranks",
    "AsyncIOBuilder": "offload to NVMe (needs libaio-dev)",
}
CUDA_OPS = {name: CPU_OPS[name] for name in ("AsyncIOBuilder",)}


#: Seconds after which a user is told that another process builds first.
_PATIENCE_SECONDS = 3.0

#: Compiled and loaded along with AsyncIO.
_PINNED = "pin_memory"

#: Advice for another folder of compiled ops.
INSTEAD = "name a folder of your own with TORCH_EXTENSIONS_DIR"

#: Builder -> name of the compiled module.
MODULES = {
    "ShareMemCommBuilder": "deepspeed_shm_comm",
    "AsyncIOBuilder": "async_io",
}


def needed_ops(accelerator: str, placement: Placement | None) -> list[str]:
    """Return the builders of ops that a run needs; without a placement, those of all placements."""
    needed = ["ShareMemCommBuilder"] if accelerator == "cpu" else []
    needed += ["AsyncIOBuilder"] if placement is None or placement.uses_nvme else []
    return needed


def has_libaio() -> bool:
    """Tell whether the compiler finds the headers of libaio."""
    try:
        probe = subprocess.run(
            ["g++", "-E", "-"],
            input="#include <libaio.h>\n",
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return False
    return probe.returncode == 0


def is_built(name: str) -> bool:
    """Tell whether the op's module is compiled in this environment."""
    return bool(list(extensions_dir().glob(f"**/{MODULES[name]}.so")))


def find_foreign_op() -> Path | None:
    """Return a folder or file of the compiled ops that another user may have written, if any."""
    top = extensions_dir()
    if not top.is_dir():
        return None
    below = [
        path
        for module in (*MODULES.values(), _PINNED)
        for name in (module, f"{module}.so")
        for path in top.glob(f"**/{name}")
    ]
    # Between them torch puts one folder for each version of Python.
    between = {folder for path in below for folder in path.parents if top in folder.parents}
    return next(
        (path for path in (top, *sorted(between), *below) if find_owner_problem(path) is not None),
        None,
    )


def require_own_ops() -> None:
    """Refuse compiled ops that others may have written: every rank loads them as code.

    Raises:
        MissingPrerequisiteError: With the file or folder, and what to do.
    """
    foreign = find_foreign_op()
    if foreign is not None:
        require_own(foreign, "DeepSpeed's compiled ops", INSTEAD)


def missing_ops(accelerator: str, placement: Placement) -> list[str]:
    """Return the needed ops that are not compiled yet.

    Raises:
        MissingPrerequisiteError: What is compiled may be another user's.
    """
    if needed_ops(accelerator, placement):
        require_own_ops()
    return [name for name in needed_ops(accelerator, placement) if not is_built(name)]


def stale_locks() -> list[Path]:
    """Find torch's lock files that a killed process left behind; torch waits on them for ever.

    All of llmtune's processes load and build ops under :func:`hold_ops`, a lock that the kernel
    drops with its holder. While nobody holds it, a lock file of torch's is stale, unless another
    program compiles in its folder.
    """
    if not _can_build():
        return []
    with _ops_lock() as lock:
        return _idle_locks() if try_lock(lock) else []


def _idle_locks() -> list[Path]:
    """Return the locks in whose folder no process works."""
    found = list(extensions_dir().glob("**/lock"))
    if not found:
        return []
    busy = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            busy.add(process.cwd())
    return sorted(lock for lock in found if str(lock.parent.resolve()) not in busy)


@contextlib.contextmanager
def hold_ops(say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """In the block, no other process of llmtune loads or builds an op; stale locks are removed.

    Args:
        say: Prints a line to the user, where another process builds first.
    """
    if not _can_build():
        yield
        return
    with _ops_lock() as lock:
        deadline: float | None = time.monotonic() + _PATIENCE_SECONDS
        while not try_lock(lock):
            time.sleep(0.02)
            if deadline is not None and time.monotonic() > deadline:
                deadline = None
                say("waiting for another process that builds DeepSpeed's ops ...")
        for stale in _idle_locks():
            stale.unlink(missing_ok=True)
        yield


def _can_build() -> bool:
    """Tell whether the folder of ops is writable; an image may be read-only or another user's."""
    folder = extensions_dir()
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.access(folder, os.W_OK)


def _ops_lock() -> IO[str]:
    """Open the lock of all builds.

    Raises:
        MissingPrerequisiteError: The folder, or an op in it, is another user's.
    """
    make_own(extensions_dir(), "DeepSpeed's compiled ops", INSTEAD)
    require_own_ops()
    return open_lock(extensions_dir() / ".llmtune-build.lock")


def ensure_ops(accelerator: str, placement: Placement, say: Callable[[str], None]) -> None:
    """Compile the ops that a run needs, one process at a time.

    Raises:
        MissingPrerequisiteError: An op cannot be built here.
    """
    for name in missing_ops(accelerator, placement):
        reason = build_in_child(name, say)
        if reason is not None:
            raise MissingPrerequisiteError(
                f"DeepSpeed's {name.removesuffix('Builder')} cannot be built: {reason}\nIt needs"
                " g++, ninja and Python's headers, and libaio for NVMe: apt-get install g++"
                " python3-dev libaio-dev; pip install ninja"
            )


def load_ops(accelerator: str, placement: Placement) -> None:
    """Load a run's ops into this rank, so that DeepSpeed later finds them loaded."""
    names = needed_ops(accelerator, placement)
    if names:
        with hold_ops():
            for name in names:
                build_op(name)


def build_op(name: str) -> bool:
    """Compile and load one op in this process, inside :func:`hold_ops`.

    In a read-only folder, torch cannot take its lock, and an op that is compiled already is loaded
    as it is.

    DeepSpeed's builders for CPUs are used on GPUs too: no source of these ops calls CUDA, and the
    builders for CUDA require its toolkit without using it, and compile again where a GPU comes or
    goes. DeepSpeed 0.19.8 keeps loaded modules by name (``OpBuilder._loaded_ops`` in
    ``ops/op_builder/builder.py``), so that its builders for CUDA find what was loaded here.

    Returns:
        False where the machine cannot compile the op.
    """
    from deepspeed.ops.op_builder import cpu
    from deepspeed.ops.op_builder.builder import OpBuilder

    builder = getattr(cpu, name)()
    if not _can_build():
        OpBuilder.jit_load = _load_compiled
        builder.load()
        return True
    if name == "AsyncIOBuilder":
        # For any CPU of the architecture, so that an image runs on other machines too; disks are
        # the bottleneck.
        builder.cpu_arch = lambda: ""
        builder.simd_width = lambda: "-D__SCALAR__"
    if not builder.is_compatible(verbose=False):
        return False
    builder.load(verbose=False)
    return True


# The signature of the original.
def _load_compiled(builder: Any, verbose: bool = False) -> ModuleType:  # noqa: ARG001
    """Load a compiled module instead of DeepSpeed's ``OpBuilder.jit_load``.

    Raises:
        PermissionError: It is not compiled, and the folder cannot be written.
    """
    folder = extensions_dir()
    file = next(folder.glob(f"**/{builder.name}.so"), None)
    if file is None:
        raise PermissionError(
            f"{builder.name} is not compiled in {folder}, which cannot be written: set"
            " TORCH_EXTENSIONS_DIR to a folder that can"
        )
    loader = importlib.machinery.ExtensionFileLoader(builder.name, str(file))
    spec = importlib.util.spec_from_loader(builder.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    builder._loaded_ops[builder.name] = module
    return module


def build_in_child(name: str, say: Callable[[str], None] = lambda _: None) -> str | None:
    """Compile one op, or try whether it loads, in a child process with its output captured.

    Args:
        say: Prints a line to the user before a build, which takes a while.

    Returns:
        The end of the child's output where it failed, otherwise None.
    """
    if not is_built(name):
        say(
            f"building DeepSpeed's {name.removesuffix('Builder')} (once per environment, about"
            " a minute) ..."
        )
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    command = [sys.executable, "-m", "llmtune.launch.preflight.deepspeed_ops", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip()[-600:]


def _say(stream: TextIO, text: str) -> None:
    stream.write(f"{text}\n")
    stream.flush()


def main(names: list[str]) -> int:
    """Build the named ops, or all that this machine can use; return the exit code."""
    import torch

    accelerator = os.environ.get("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    set_defaults(accelerator, 1)
    reasons = CPU_OPS if accelerator == "cpu" else CUDA_OPS
    failed = []
    for name in names or list(reasons):
        try:
            with hold_ops(lambda text: _say(sys.stderr, text)):
                built = build_op(name)
        except Exception as error:
            sys.stderr.write(f"{name}: {error}\n")
            built = False
        state = "ready" if built else "cannot be built here"
        sys.stdout.write(
            f"DeepSpeed op {name.removesuffix('Builder')}: {state}"
            f" ({reasons.get(name, 'asked for')})\n"
        )
        if not built:
            failed.append(name)
    # Only what was asked for by name must work: NVMe offload is optional.
    return 1 if failed and names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
