"""A save that fails on one rank fails on all of them, publishes nothing, and leaves nobody
waiting.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llmtune.checkpoint.find import find_checkpoints
from llmtune.launch.launchers.environment import remove_shared_buffers, set_defaults
from llmtune.storage.manifest import find_damage
from tests.support import ROOT, free_port


@pytest.mark.process
@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_write_is_heard_by_all(failing: int, tmp_path: Path) -> None:
    set_defaults("cpu", 2)
    port = free_port()
    command = [sys.executable, "-m", "tests.checkpoint.saver_worker", str(tmp_path), str(failing)]
    ranks = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
        env = {
            **os.environ,
            **place,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        with (tmp_path / f"{rank}.log").open("w") as log:
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))
    try:
        codes = [rank.wait(120) for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
        remove_shared_buffers(port)
    assert codes == [0, 0], (tmp_path / "0.log").read_text()[-2000:] + (
        tmp_path / "1.log"
    ).read_text()[-2000:]
    first, second = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(2))
    assert first == second, "every rank learns the same"
    for mode in (False, True):
        assert first[f"good {mode}"] == first[f"again {mode}"] == ""
        assert first[f"nan {mode}"].startswith("CheckpointError: "), first[f"nan {mode}"]
        assert "model-0.safetensors: tensor w holds NaN" in first[f"nan {mode}"]
        full = first[f"full {mode}"]
        assert full.startswith("DiskRefusedError: ")
        assert f"rank {failing}: [Errno 28] No space left on device" in full
    assert not list(tmp_path.glob("*.tmp")), "half a checkpoint is of no use"
    found = find_checkpoints(tmp_path)
    assert [folder.name for folder in found] == ["checkpoint-1", "checkpoint-10"], (
        "nothing else was published"
    )
    for folder in found:
        assert find_damage(folder) == []
        assert {path.name for path in folder.iterdir()} == {
            *("COMPLETE", "manifest.json", "trainer_state.json", "config.json"),
            *("model-0.safetensors", "model-1.safetensors"),
        }
        assert load_file(folder / "model-1.safetensors")["w"].tolist() == [2.0] * 8, (
            "saved again, it is the newer"
        )
