"""Two ways to load a model on the ranks of ZeRO 3: their processes, and what each rank measures.

Imports nothing of llmtune.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from watch import anonymous_bytes

RANKS = 2

#: No progress bars, and no warnings of libraries.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}


class Peak:
    """The most anonymous memory of this process from here on, above what it had."""

    def __init__(self) -> None:
        self._before: int = anonymous_bytes(os.getpid())
        self._most = self._before
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._most = max(self._most, anonymous_bytes(os.getpid()))

    def stop(self) -> int:
        """Return its bytes."""
        self._done.set()
        self._watcher.join()
        most: int = max(self._most, anonymous_bytes(os.getpid()))
        return most - self._before


def kept_bytes(model: Any) -> int:
    """Bytes of the parameters that this rank keeps."""
    slices: Any = (parameter.ds_tensor for parameter in model.parameters())
    return sum(int(one.numel() * one.element_size()) for one in slices)


def join_transformers(meeting: Path) -> tuple[dict[str, Any], Any]:
    """Join the ranks as transformers' trainers do; DeepSpeed's settings, and what makes
    transformers partition models.
    """
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    deepspeed.init_distributed(
        "gloo",
        init_method=f"file://{meeting}",
        rank=int(os.environ["RANK"]),
        world_size=RANKS,
        verbose=False,
    )
    settings: dict[str, Any] = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": 1,
    }
    return settings, HfDeepSpeedConfig(settings)


def run_side(program: str, side: str, folder: Path, root: Path) -> list[dict[str, float]]:
    """Start the ranks of one side, and return what each measured.

    Args:
        program: The file that takes ``--side SIDE MODEL MEETING``.

    Raises:
        RuntimeError: A rank failed.
    """
    meeting = root / f"meeting-{side}-{len(list(root.glob('meeting-*')))}"
    processes = []
    for rank in range(RANKS):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
        # DeepSpeed asks for both, though the ranks meet through a file.
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        processes.append(
            subprocess.Popen(
                [sys.executable, program, "--side", side, str(folder), str(meeting)],
                env={**os.environ, "OMP_NUM_THREADS": "1", **QUIET, **place},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    found = []
    for process in processes:
        out, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{side}: a rank ended with {process.returncode}")
        found.append(json.loads(out.splitlines()[-1]))
    return found
