"""Where a run goes on from: the newest checkpoint that is whole, here or at the mirror."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from llmtune.checkpoint.mirror import Mirror
from llmtune.checkpoint.trainer_state import TrainerState
from llmtune.config.compose import compose_config
from llmtune.config.schema import Config
from llmtune.config.stored import dump_redacted
from llmtune.draws import DRAWS_VERSION
from llmtune.errors import CheckpointError
from llmtune.storage import remote
from llmtune.storage.hashing import hash_file
from llmtune.storage.manifest import mark_complete, write_manifest
from llmtune.train.resume import resume_point
from llmtune.train.run_folder import RunFolder
from tests.support import TINY, losses, run_cli


def config_of(*overrides: str) -> Config:
    return compose_config(["model=tiny", *overrides]).config


def make(
    run: Path,
    step: int,
    config: Config,
    draws_version: int = DRAWS_VERSION,
    best: dict[str, Any] | None = None,
) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    state = TrainerState(
        step=step,
        tokens=0,
        skipped=0,
        data_fingerprint="x",
        data_position=None,
        tracker_run_id="abc",
        draws_version=draws_version,
        best=best,
    )
    (folder / "trainer_state.json").write_text(state.to_json())
    (folder / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
    (folder / "config.yaml").write_text(dump_redacted(config))
    write_manifest(
        folder, {file.name: hash_file(file) for file in folder.iterdir()}, {"step": step}
    )
    mark_complete(folder)
    return folder


def damage(folder: Path) -> None:
    file = folder / "trainer_state.json"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path: Path) -> None:
    config = config_of()
    said: list[str] = []
    folders = [make(tmp_path, step, config) for step in (5, 10, 15)]
    run = RunFolder(tmp_path)
    assert resume_point(run, config, "r", said.append) == folders[2]
    damage(folders[2])
    (folders[1] / "trainer_state.json").unlink()
    assert resume_point(run, config, "r", said.append) == folders[0]
    assert "checkpoint-15 is damaged and skipped: trainer_state.json has other contents" in said[0]
    assert "checkpoint-10 is damaged and skipped: trainer_state.json is missing" in said[1]
    damage(folders[0])
    with pytest.raises(CheckpointError, match="every checkpoint in it is damaged"):
        resume_point(run, config, "r", said.append)
    assert all(folder.is_dir() for folder in folders), "nothing is removed"


def test_a_named_checkpoint_must_be_whole_and_of_this_run(tmp_path: Path) -> None:
    config = config_of()
    folder = make(tmp_path / "a", 5, config)
    run = RunFolder(tmp_path / "b")
    named = config_of(f"resume_from_checkpoint={folder}")
    assert resume_point(run, named, "r", print) == folder
    with pytest.raises(CheckpointError, match="seed: 42 there, 7 now"):
        resume_point(run, config_of(f"resume_from_checkpoint={folder}", "seed=7"), "r", print)
    # Of a long value, that of it which differs.
    with pytest.raises(
        CheckpointError, match=r":\n  model.config.num_hidden_layers: 2 there, 3 now\nTake"
    ):
        resume_point(
            run,
            config_of(f"resume_from_checkpoint={folder}", "model.config.num_hidden_layers=3"),
            "r",
            print,
        )
    # A null is not the same as nothing, which leaves the base's own value.
    with pytest.raises(
        CheckpointError, match=r"model.config.rope_scaling: not set there, None now"
    ):
        resume_point(
            run,
            config_of(f"resume_from_checkpoint={folder}", "+model.config.rope_scaling=null"),
            "r",
            print,
        )
    damage(folder)
    with pytest.raises(CheckpointError, match=r"is damaged: trainer_state.json"):
        resume_point(run, named, "r", print)
    assert resume_point(run, config_of("resume_from_checkpoint=none"), "r", print) is None


def test_a_lost_run_folder_comes_back_from_the_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.0)
    url = str(tmp_path / "elsewhere")
    config = config_of(f"checkpoint.mirror={url}")
    said: list[str] = []
    run = RunFolder(tmp_path / "run")
    copies = Mirror(url, "r", print)
    for step in (5, 10):
        copies.put(make(run.path, step, config), {"checkpoint-5", "checkpoint-10"})
    assert copies.finish(30) == []
    shutil.rmtree(run.path)
    run.path.mkdir()
    found = resume_point(run, config, "r", said.append)
    assert found == run.path / "checkpoint-10"
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 10}\n'
    assert (run.path / "wandb" / "run_id").read_text() == "abc"
    # What is newer here is not replaced, and a mirror out of reach is not needed then.
    newest = make(run.path, 15, config)
    assert resume_point(run, config, "r", said.append) == newest

    def unreachable(*_: object) -> None:
        raise CheckpointError("no network")

    monkeypatch.setattr("llmtune.train.resume.find_remote", unreachable)
    assert resume_point(run, config, "r", said.append) == newest
    assert "no network; resuming from the local checkpoint-15" in said[-1]
    shutil.rmtree(run.path)
    run.path.mkdir()
    with pytest.raises(CheckpointError, match="no network"):
        resume_point(run, config, "r", said.append)


def test_the_best_checkpoint_comes_back_from_the_mirror_beside_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.0)
    url = str(tmp_path / "elsewhere")
    chooses = ["train.eval_steps=5", "checkpoint.metric_for_best_model=eval_loss"]
    config = config_of(f"checkpoint.mirror={url}", *chooses)
    best = {"metric": "eval_loss", "value": 1.0, "step": 5}
    run, said = RunFolder(tmp_path / "run"), list[str]()
    copies = Mirror(url, "r", print)
    for step in (5, 10, 15):
        copies.put(make(run.path, step, config, best=best), None)
    assert copies.finish(30) == []
    shutil.rmtree(run.path)
    run.path.mkdir()
    assert resume_point(run, config, "r", said.append) == run.path / "checkpoint-15"
    there = sorted(path.name for path in run.path.glob("checkpoint-*"))
    assert there == ["checkpoint-15", "checkpoint-5"]
    # Also where the fetch was cut off behind the newest; and nobody else's best is fetched.
    shutil.rmtree(run.path / "checkpoint-5")
    assert resume_point(run, config, "r", said.append) == run.path / "checkpoint-15"
    assert (run.path / "checkpoint-5" / "COMPLETE").is_file()
    shutil.rmtree(run.path / "checkpoint-5")
    plain = config_of(f"checkpoint.mirror={url}")
    assert resume_point(run, plain, "r", said.append) == run.path / "checkpoint-15"
    assert not (run.path / "checkpoint-5").exists()

    def unreachable(*_: object) -> None:
        raise CheckpointError("no network")

    monkeypatch.setattr("llmtune.train.resume.find_remote", unreachable)
    assert resume_point(run, config, "r", said.append) == run.path / "checkpoint-15"
    assert "warning: the best checkpoint so far, of step 5, was not fetched: no network" in said


def test_a_start_that_ended_behind_its_fetch_goes_on_and_another_run_does_not(
    tmp_path: Path,
) -> None:
    """The folder then holds a checkpoint and no configuration of its own."""
    config = config_of()
    folder = make(tmp_path, 5, config)
    run = RunFolder(tmp_path)
    assert run.find_changes(config) == []
    assert resume_point(run, config, "r", print) == folder
    with pytest.raises(CheckpointError, match="seed: 42 there, 7 now"):
        resume_point(run, config_of("seed=7"), "r", print)


def test_a_run_that_began_with_other_draws_is_refused(tmp_path: Path) -> None:
    config = config_of()
    older = make(tmp_path, 5, config, draws_version=DRAWS_VERSION - 1)
    text = (older / "trainer_state.json").read_text()
    assert f'"draws_version": {DRAWS_VERSION - 1}' in text
    for chosen in (config, config_of(f"resume_from_checkpoint={older}")):
        with pytest.raises(
            CheckpointError,
            match=(
                rf"version {DRAWS_VERSION - 1} of the random draws, and this llmtune has version"
                rf" {DRAWS_VERSION}"
            ),
        ):
            resume_point(RunFolder(tmp_path), chosen, "r", print)
    make(tmp_path, 10, config)
    assert resume_point(RunFolder(tmp_path), config, "r", print) == tmp_path / "checkpoint-10"


def test_a_checkpoint_that_is_not_there_is_not_called_damaged(tmp_path: Path) -> None:
    config = config_of(f"resume_from_checkpoint={tmp_path / 'none'}")
    with pytest.raises(CheckpointError, match=r"/none: no such folder$"):
        resume_point(RunFolder(tmp_path), config, "r", print)


@pytest.mark.process
def test_dropout_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    """Interrupted or not, with or without workers that make the batches."""
    base = [
        *TINY,
        "tuner.lora_dropout=0.3",
        "precision=fp32",
        "train.save_steps=2",
        "export=none",
        "launch.nproc=1",
    ]
    base += ["schedule.lr_scheduler_type=constant", "schedule.warmup_ratio=0", "train.eval_steps=2"]

    def curve(name: str, *overrides: str) -> list[float]:
        done = run_cli(*base, f"output_dir={tmp_path / name}", *overrides)
        assert done.code == 0, done.err
        return losses(tmp_path / name)

    whole = curve("whole", "train.max_steps=5")
    assert curve("parts", "train.max_steps=2") == whole[:2]
    assert curve("parts", "train.max_steps=5", "data.dataloader_num_workers=1") == whole
    assert curve("without", "train.max_steps=2", "tuner.lora_dropout=0") != whole[:2]
