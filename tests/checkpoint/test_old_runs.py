"""A run that llmtune 0.1.0 made is read, and goes on with the losses that 0.1.0 had.

``run-0.1.0.tar.xz`` was made by commit ``1ae92911~1``: the tiny model, LoRA of rank 2, four steps
with a checkpoint after two, fp32, on one CPU rank. It has the rows beside the run.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from llmtune.checkpoint.find import find_checkpoints
from llmtune.checkpoint.trainer_state import read_trainer_state
from llmtune.config.stored import load_config
from llmtune.errors import CheckpointError
from llmtune.storage import layout
from llmtune.storage.hashing import hash_bytes
from llmtune.storage.manifest import check_undamaged, find_damage, read_manifest
from tests.support import losses, run_cli

ARCHIVE = Path(__file__).parent / "run-0.1.0.tar.xz"
COMMAND = [
    *("model=tiny", "data.train=rows.jsonl", "data.val_set_size=4", "launch.nproc=1"),
    *("precision=fp32", "tuner.lora_r=2", "train.max_steps=4", "train.save_steps=2"),
    *("train.eval_steps=2", "train.sample_answers=false", "output_dir=run", "export=none"),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The run folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_what_it_published_is_whole_and_of_the_first_format(run: Path) -> None:
    folders = [*find_checkpoints(run), run / layout.ADAPTER]
    assert [folder.name for folder in folders] == ["checkpoint-2", "checkpoint-4", "adapter"]
    for folder in folders:
        assert find_damage(folder) == []
        manifest = read_manifest(folder)
        assert "format_version" not in manifest
    assert read_trainer_state(folders[1]).step == 4
    assert load_config(run / layout.CONFIG).tuner.lora_r == 2


@pytest.mark.parametrize("version", [2, 17, "1", None])
def test_a_format_that_is_not_known_is_refused_with_the_version_that_reads_it(
    version: object, run: Path
) -> None:
    folder = run / "checkpoint-4"
    file = folder / layout.MANIFEST
    manifest = {**json.loads(file.read_text()), "llmtune_version": "9.1.0"}
    text = json.dumps({**manifest, "format_version": version})
    file.write_text(text)
    (folder / layout.COMPLETE).write_text(hash_bytes(text.encode()))
    with pytest.raises(CheckpointError, match=r"format .* of llmtune 9\.1\.0.* install that"):
        check_undamaged(folder)


@pytest.mark.process
def test_it_goes_on_to_the_same_losses(run: Path) -> None:
    known = losses(run)
    assert len(known) == 4
    # As if it had been killed behind its first checkpoint.
    for name in ("checkpoint-4", layout.ADAPTER):
        shutil.rmtree(run / name)
    (run / layout.FINISHED).unlink()
    done = run_cli(*COMMAND, cwd=run.parent)
    assert done.code == 0, done.err + done.out
    assert "checkpoint-2" in done.out
    found = losses(run)
    assert found[:2] == known[:2], "the lines of 0.1.0 stay"
    assert found == pytest.approx(known, abs=1e-5)
    assert read_manifest(run / layout.ADAPTER)["format_version"] == 1
