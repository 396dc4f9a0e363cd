"""DeepSpeed's compiled ops, built before any rank needs them: ranks that build at once wait on each other's locks.

``python -m llmtune.launch.ops`` builds what this machine can use; the set-up scripts call it.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable

from llmtune.errors import MissingPrerequisiteError
from llmtune.launch.environment import extensions_dir, set_defaults

#: Op -> why; by the names of DeepSpeed's builders.
CPU_OPS = {
    "ShareMemCommBuilder": "collectives of CPU ranks",
    "CPUAdamBuilder": "optimizer on the host (offload)",
    "AsyncIOBuilder": "offload to NVMe (needs libaio-dev)",
}
CUDA_OPS = {name: CPU_OPS[name] for name in ("CPUAdamBuilder", "AsyncIOBuilder")}


def missing_ops(accelerator: str, offload_optimizer: bool) -> list[str]:
    """Builders of ops that a run needs and that are not compiled yet."""
    needed = ["ShareMemCommBuilder"] if accelerator == "cpu" else []
    needed += ["CPUAdamBuilder"] if offload_optimizer else []
    names = {"ShareMemCommBuilder": "deepspeed_shm_comm", "CPUAdamBuilder": "cpu_adam"}
    folder = extensions_dir()
    return [name for name in needed if not list(folder.glob(f"**/{names[name]}.so"))]


def ensure_ops(accelerator: str, offload_optimizer: bool, say: Callable[[str], None]) -> None:
    """Compile what a run needs, one process at a time.

    Raises:
        MissingPrerequisiteError: An op cannot be built here.
    """
    folder = extensions_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".llmtune-build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in missing_ops(accelerator, offload_optimizer):
            say(f"building DeepSpeed's {name.removesuffix('Builder')} (once an environment, about a minute) ...")
            reason = build_in_child(name)
            if reason is not None:
                raise MissingPrerequisiteError(
                    f"DeepSpeed's {name.removesuffix('Builder')} cannot be built: {reason}\n"
                    "It needs g++, ninja and Python's headers: apt-get install g++ python3-dev; pip install ninja"
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
