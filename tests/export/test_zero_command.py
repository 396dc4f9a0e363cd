"""``export checkpoint=`` of what DeepSpeed wrote, as a user gives it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtune.cli.main import Command
from llmtune.storage.manifest import find_damage
from tests.export.zero_worker import make_model
from tests.support import run_cli, train_engines


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA checkpoint of ZeRO 2 without frozen parameters, and the model that it was trained
    from.
    """
    folder = tmp_path_factory.mktemp("zero-command")
    task = {"stage": 2, "lora": {}, "exclude": True, "folder": str(folder / "checkpoint")}
    train_engines([task], 2, folder, timeout=300, module="tests.export.zero_worker")
    make_model({"stage": 3}).llama.save_pretrained(folder / "base")
    return folder


@pytest.mark.process
def test_a_lora_checkpoint_of_deepspeed_is_merged_into_its_base(
    written: Path, tmp_path: Path
) -> None:
    command = ["export", f"checkpoint={written}/checkpoint"]
    done = run_cli(*command, f"base={written}/base", f"output_dir={tmp_path}/out")
    assert done.code == 0, done.err
    assert "parity: logits within" in done.out
    assert find_damage(tmp_path / "out") == []
    merged, base = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(written / "base" / "model.safetensors"),
    )
    assert merged.keys() == base.keys()
    changed = {
        name
        for name, tensor in merged.items()
        if not torch.equal(tensor, base[name].to(tensor.dtype))
    }
    assert changed == {name for name in base if "proj.weight" in name}
    done = run_cli(*command, f"output_dir={tmp_path}/other")
    assert done.code == 2
    assert "give base=MODEL, what it was trained from" in done.err


@pytest.mark.process
def test_a_killed_export_of_a_lora_checkpoint_goes_on_where_it_was(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [
        f"checkpoint={written}/checkpoint",
        f"base={written}/base",
        f"output_dir={tmp_path}/out",
    ]
    command = Command(["export", *overrides, "export.max_shard_bytes=4000"])

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llmtune.export.pipeline.write_model_card", fail)
        with pytest.raises(KeyboardInterrupt):
            command.run()
    shards = {
        file.name: file.stat().st_mtime_ns for file in (tmp_path / "out.tmp").glob("*.safetensors")
    }
    assert len(shards) > 3
    command.run()
    assert {
        file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.safetensors")
    } == shards
