"""DeepSpeed's ops on a machine with GPUs and no CUDA toolkit, and builds and loads that are killed
in the middle.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtune.launch.launchers.environment import extensions_dir
from llmtune.launch.preflight import deepspeed_ops
from tests.support import ROOT, TINY, run

#: Loads the op as a rank on a GPU does, then asks DeepSpeed for CUDA's.
LOAD = """
import torch.utils.cpp_extension
# Wherever torch has found a toolkit, which may also be in /usr/local.
torch.utils.cpp_extension.CUDA_HOME = None
from llmtune.launch.preflight.deepspeed_ops import build_op, hold_ops
with hold_ops():
    assert build_op("AsyncIOBuilder")
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder
assert get_accelerator().device_name() == "cuda"
assert AsyncIOBuilder.__module__ == "deepspeed.ops.op_builder.async_io", "CUDA's builder"
module = AsyncIOBuilder().load()
print(module.__file__, module.aio_handle(1048576, 8, False, True, 1).get_block_size())
"""


def without_toolkit(folder: Path) -> dict[str, str]:
    """The surroundings of a process for CUDA where pip has installed everything."""
    path = [
        part for part in os.environ["PATH"].split(os.pathsep) if not (Path(part) / "nvcc").exists()
    ]
    gone = {"CUDA_HOME": "", "CUDA_PATH": "", "LLMTUNE_TEST_START": "cold"}
    return {
        **gone,
        "PATH": os.pathsep.join(path),
        "DS_ACCELERATOR": "cuda",
        "TORCH_EXTENSIONS_DIR": str(folder),
    }


@pytest.mark.process
def test_cuda_takes_the_op_that_was_built_for_any_machine() -> None:
    built = extensions_dir() / "async_io" / "async_io.so"
    # Whoever came here first has built it.
    assert deepspeed_ops.build_in_child("AsyncIOBuilder") is None
    before = built.stat().st_mtime_ns
    done = run([sys.executable, "-c", LOAD], env=without_toolkit(extensions_dir()))
    assert done.out.split() == [str(built), "1048576"], done.err[-2000:]
    assert built.stat().st_mtime_ns == before, "compiled anew"


@pytest.mark.process
@pytest.mark.slow
def test_cuda_builds_the_op_without_a_toolkit(tmp_path: Path) -> None:
    done = run([sys.executable, "-c", LOAD], env=without_toolkit(tmp_path), timeout=900)
    assert done.out.split() == [str(tmp_path / "async_io" / "async_io.so"), "1048576"], done.err[
        -2000:
    ]
    assert "march=native" not in (tmp_path / "async_io" / "build.ninja").read_text(), (
        "it runs on the next machine too"
    )


@pytest.mark.process
def test_an_image_that_is_read_only_loads_what_was_compiled_in_it(tmp_path: Path) -> None:
    assert deepspeed_ops.build_in_child("AsyncIOBuilder") is None
    image = tmp_path / "image"
    for name in ("async_io", "pin_memory"):
        (image / name).mkdir(parents=True)
        shutil.copy(extensions_dir() / name / f"{name}.so", image / name)
    before = sorted(image.rglob("*"))
    # The superuser may write anywhere, so that it has to be told; torch's lock and the build's
    # would be new files.
    read_only = "import os\nos.access = lambda path, mode: False\n"
    done = run([sys.executable, "-c", read_only + LOAD], env=without_toolkit(image))
    assert done.out.split() == [str(image / "async_io" / "async_io.so"), "1048576"], done.err[
        -2000:
    ]
    assert sorted(image.rglob("*")) == before
    empty = tmp_path / "empty"
    refused = run([sys.executable, "-c", read_only + LOAD], env=without_toolkit(empty))
    assert (
        f"not compiled in {empty}, which cannot be written: set TORCH_EXTENSIONS_DIR" in refused.err
    )


HOLD = """
import sys, time
from llmtune.launch.preflight.deepspeed_ops import extensions_dir, hold_ops
with hold_ops():
    (extensions_dir() / "async_io").mkdir(exist_ok=True)
    (extensions_dir() / "async_io" / "lock").touch()
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.process
def test_a_lock_is_stale_as_soon_as_its_holder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "async_io" / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert deepspeed_ops.stale_locks() == [], "it is at work"
    assert lock.exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert deepspeed_ops.stale_locks() == [lock]
    with deepspeed_ops.hold_ops():
        assert not lock.exists()


def test_who_waits_is_told_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(deepspeed_ops, "_PATIENCE_SECONDS", 0.01)
    said: list[str] = []
    with deepspeed_ops.hold_ops():

        def give_up(text: str) -> None:
            said.append(text)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), deepspeed_ops.hold_ops(give_up):
            pass
    assert said == ["waiting for another process that builds DeepSpeed's ops ..."]


LAUNCHERS = {
    "supervisor": [sys.executable, "-m", "llmtune"],
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "scripts/train.py",
    ],
    "deepspeed": [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus=2",
        "scripts/train.py",
    ],
}


@pytest.mark.process
@pytest.mark.parametrize(
    ("launcher", "kills"),
    [("supervisor", 2), *(pytest.param(name, 34, marks=pytest.mark.slow) for name in LAUNCHERS)],
)
def test_kills_during_the_start_leave_nothing_that_blocks(
    launcher: str, kills: int, tmp_path: Path
) -> None:
    shutil.copytree(extensions_dir(), tmp_path / "extensions")
    job = [*TINY, "launch.nproc=2"] if launcher == "supervisor" else TINY
    job = [
        *job,
        "train.max_steps=1",
        "train.global_batch_size=2",
        "export=none",
        f"output_dir={tmp_path}/run",
    ]
    command = [*LAUNCHERS[launcher], *job]
    environment = {
        **os.environ,
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "OMP_NUM_THREADS": "1",
    }
    chance = random.Random(launcher)
    for _ in range(kills):
        with (tmp_path / "out").open("w") as out:
            started = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
            )
        time.sleep(chance.uniform(0.0, 4.0 if launcher == "supervisor" else 9.0))
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=150
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
    assert (tmp_path / "run" / "finished").exists() or "finished" in done.stdout
