"""DeepSpeed's compiled ops, built before any rank needs them: ranks that build at once wait on each other's locks.

``python -m llmtune.launch.ops`` builds what this machine can use; the set-up scripts call it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from llmtune.errors import MissingPrerequisiteError
from llmtune.launch.environment import extensions_dir, set_defaults
from llmtune.plan.placement import Placement

#: Op -> why; by the names of DeepSpeed's builders.
CPU_OPS = {
    "ShareMemCommBuilder": "collectives of CPU ranks",
    "AsyncIOBuilder": "offload to NVMe (needs libaio-dev)",
}
CUDA_OPS = {name: CPU_OPS[name] for name in ("AsyncIOBuilder",)}


#: A lock that is only there while an op is loaded is gone sooner.
_SETTLE_SECONDS = 5.0

#: Builder -> name of the compiled module.
MODULES = {
    "ShareMemCommBuilder": "deepspeed_shm_comm",
    "AsyncIOBuilder": "async_io",
}


def needed_ops(accelerator: str, placement: Placement | None) -> list[str]:
    """Builders of ops that a run needs; without a placement, all that any placement does."""
    needed = ["ShareMemCommBuilder"] if accelerator == "cpu" else []
    needed += ["AsyncIOBuilder"] if placement is None or placement.uses_nvme else []
    return needed


def is_built(name: str) -> bool:
    """Whether the op's module is compiled in this environment."""
    return bool(list(extensions_dir().glob(f"**/{MODULES[name]}.so")))


def missing_ops(accelerator: str, placement: Placement) -> list[str]:
    """Those that are not compiled yet."""
    return [name for name in needed_ops(accelerator, placement) if not is_built(name)]


def stale_locks() -> list[Path]:
    """Lock files that a build left behind when it was killed: every later run waits on them for ever, in silence.

    A build that goes on runs its compiler in the lock's folder. Loading a compiled op makes the lock too, for a moment and
    with no compiler to be seen, so that only one which stays is called stale.
    """
    found = _idle_locks()
    deadline = time.monotonic() + _SETTLE_SECONDS
    while found and time.monotonic() < deadline:
        time.sleep(0.2)
        now = _idle_locks()
        found = {lock: made for lock, made in found.items() if now.get(lock) == made}
    return sorted(found)


def _idle_locks() -> dict[Path, tuple[int, int]]:
    """Locks in whose folder no process works, and what tells each from one made anew."""
    busy = set()
    for process in psutil.process_iter():
        try:
            busy.add(process.cwd())
        except psutil.Error:
            continue
    idle = {}
    for lock in extensions_dir().glob("**/lock"):
        with contextlib.suppress(FileNotFoundError):
            status = lock.stat()
            if str(lock.parent.resolve()) not in busy:
                idle[lock] = (status.st_ino, status.st_mtime_ns)
    return idle


def ensure_ops(accelerator: str, placement: Placement, say: Callable[[str], None]) -> None:
    """Compile what a run needs, one process at a time.

    Raises:
        MissingPrerequisiteError: An op cannot be built here, or a build that was killed left its lock.
    """
    folder = extensions_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".llmtune-build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stale := stale_locks():
            raise MissingPrerequisiteError(
                f"{stale[0]}: a build of DeepSpeed's ops was killed and left this lock, on which every run would hang; "
                "run: python -m llmtune doctor --fix"
            )
        for name in missing_ops(accelerator, placement):
            say(f"building DeepSpeed's {name.removesuffix('Builder')} (once an environment, about a minute) ...")
            reason = build_in_child(name)
            if reason is not None:
                raise MissingPrerequisiteError(
                    f"DeepSpeed's {name.removesuffix('Builder')} cannot be built: {reason}\n"
                    "It needs g++, ninja and Python's headers, and libaio for NVMe: apt-get install g++ python3-dev "
                    "libaio-dev; pip install ninja"
                )


def build_op(name: str) -> bool:
    """Compile and load one op in this process; False where the machine cannot."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(name)
    if builder is None or not builder.is_compatible(verbose=False):
        return False
    builder.load(verbose=False)
    return True


def build_in_child(name: str) -> str | None:
    """Compile one op in a process of its own, whose output is kept off the console; what it said, where it failed."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "llmtune.launch.ops", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip()[-600:]


def main(names: list[str]) -> int:
    """Build the named ops, or all that this machine can use."""
    import torch

    accelerator = os.environ.get("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    set_defaults(accelerator, 1)
    reasons = CPU_OPS if accelerator == "cpu" else CUDA_OPS
    failed = []
    for name in names or list(reasons):
        try:
            built = build_op(name)
        except Exception as error:
            sys.stderr.write(f"{name}: {error}\n")
            built = False
        state = "ready" if built else "cannot be built here"
        sys.stdout.write(f"DeepSpeed op {name.removesuffix('Builder')}: {state} ({reasons.get(name, 'asked for')})\n")
        if not built:
            failed.append(name)
    # Only what was asked for by name must work: NVMe offload is optional.
    return 1 if failed and names else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
