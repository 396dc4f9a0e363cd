"""Two ranks that save small things, on which a test lets the disk fail; run by ``test_save.py``."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from llmtune.checkpoint import save
from llmtune.checkpoint.trainer_state import TrainerState
from llmtune.checkpoint.weight_files import WeightFiles
from llmtune.checkpoint.writer import Buffers
from llmtune.engine.distributed import Rank, barrier
from llmtune.errors import CheckpointError
from llmtune.storage.tensors.tensor_spec import TensorSpec
from tests.joined import join_ranks


def stand_in(rank: Rank, value: float) -> None:
    """One small tensor a rank in the place of a model's weights and states."""

    def add_weights(_module: Any, _files: Any, writer: Any) -> None:
        writer.start(f"model-{rank.rank}.safetensors", [TensorSpec("w", torch.float32, (8,))])
        writer.add(torch.full((8,), value))

    patch.object(save, "add_weights", add_weights).start()
    patch.object(save, "add_states", lambda *_: None).start()
    patch.object(save, "optimizer_steps", lambda _: 1).start()
    patch.object(save, "read_loss_scale", lambda _: {}).start()


def attempt(rank: Rank, folder: Path, background: bool, value: float = 1.0) -> str:
    """Save once; the error, or nothing."""
    stand_in(rank, value)
    module: Any = SimpleNamespace(rank=rank)
    state = TrainerState(
        step=int(folder.name.split("-")[1]),
        tokens=0,
        skipped=0,
        data_fingerprint="x",
        data_position=None,
    )
    request = save.SaveRequest(
        folder=folder,
        state=state,
        weights=WeightFiles(adapter_only=False),
        model_files={"config.json": b"{}"},
        about={"step": state.step},
    )
    try:
        save.begin_save(module, request, Buffers() if background else None).finish()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refuse_on(number: int, rank: Rank, names: str) -> None:
    """From here on nothing whose name begins so can be written on one rank, its report included."""
    if rank.rank != number:
        return
    original = os.open

    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if Path(os.fsdecode(path)).name.startswith(names) and flags & os.O_WRONLY:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, flags, *rest, **more)

    os.open = refusing
    write_atomically = vars(save)["write_atomically"]

    def refuse_small(path: Path, data: bytes) -> None:
        if path.name.startswith(("written", names)):
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(path, data)

    patch.object(save, "write_atomically", refuse_small).start()


if __name__ == "__main__":
    this, run = join_ranks(), Path(sys.argv[1])
    said = {}
    for mode in (False, True):
        step = 10 if mode else 1
        said[f"good {mode}"] = attempt(this, run / f"checkpoint-{step}", mode)
        said[f"again {mode}"] = attempt(this, run / f"checkpoint-{step}", mode, 2.0)
        said[f"nan {mode}"] = attempt(this, run / f"checkpoint-{step + 1}", mode, float("nan"))
    refuse_on(int(sys.argv[2]), this, "model")
    for mode in (False, True):
        said[f"full {mode}"] = attempt(this, run / f"checkpoint-{30 + mode}", mode)
    Path(f"{run}/said-{this.rank}.json").write_text(json.dumps(said))
    barrier(this)
    os._exit(0)
