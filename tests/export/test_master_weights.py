"""Master weights of llmtune's own checkpoints: the live optimizer's numbers, or an error that names
what is missing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.checkpoint.result import link_result
from llmtune.checkpoint.slices import PiecedTensor, TensorSlice, find_gap
from llmtune.config.groups.export import ExportConfig, ExportDtype
from llmtune.errors import ExportError
from llmtune.export.open_model import open_export_model
from llmtune.export.progress import ProgressCallbacks
from llmtune.export.publish.shards import Journal, write_shards
from llmtune.export.request import ExportRequest
from llmtune.export.sources.master_weights import (
    MasterWeightsSource,
    find_master_weights,
    has_master_weights,
)
from llmtune.export.sources.tensor_source import read_whole
from llmtune.storage.tensors.tensor_spec import TensorSpec
from tests.support import TINY, train_engines

#: ZeRO stage and place of the optimizer's state.
PLACES = [("0", "none"), ("2", "none"), ("3", "none"), ("3", "cpu")]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of every place, of 2 ranks, with the live master weights beside them."""
    folder = tmp_path_factory.mktemp("masters")
    tasks = []
    for stage, rung in PLACES:
        overrides = [
            *TINY,
            "tuner=full",
            "data.train=stdlib_docs@50",
            "data.val_set_size=0",
            "data.overlong=truncate",
            "precision=bf16",
        ]
        overrides += [
            f"zero={stage}",
            f"offload={rung}",
            "train.global_batch_size=2",
            "optim.learning_rate=1e-2",
        ]
        # An odd vocabulary, so that parts of the embedding are filled up.
        overrides += ["model.config.vocab_size=331"]
        name = f"{stage}-{rung}"
        tasks.append(
            {
                "overrides": overrides,
                "first": 0,
                "last": 2,
                "save": str(folder / name / "checkpoint-2"),
                "save_at": 2,
                "masters": str(folder / f"{name}.pt"),
            }
        )
    train_engines(tasks, 2, folder, timeout=900, module="tests.export.zero_worker")
    return folder


@pytest.mark.process
@pytest.mark.parametrize("place", ["-".join(place) for place in PLACES])
def test_masters_are_the_live_optimizers(place: str, checkpoints: Path) -> None:
    folder = checkpoints / place / "checkpoint-2"
    assert has_master_weights(folder)
    source = MasterWeightsSource(folder)
    live, rounded = torch.load(checkpoints / f"{place}.pt"), load_file(folder / "model.safetensors")
    assert source.specs.keys() == rounded.keys()
    assert live.keys() <= rounded.keys()
    finer = 0
    for name, values in live.items():
        found = read_whole(source, name)
        assert found.dtype == torch.float32
        assert torch.equal(found, values.reshape(found.shape)), name
        assert torch.equal(found.bfloat16(), rounded[name]), name
        finer += not torch.equal(found, rounded[name].float())
    assert finer, "masters have digits that the model files lack"


@pytest.mark.process
def test_a_model_of_masters_is_written_in_small_blocks(
    checkpoints: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("llmtune.storage.tensors.row_blocks.BLOCK_ELEMENTS", 64 * 3)
    monkeypatch.setattr("llmtune.storage.tensors.row_blocks._LEAST_ROWS", 1)
    for place in ("0-none", "3-none"):
        output = tmp_path / place
        output.mkdir()
        write_shards(
            MasterWeightsSource(checkpoints / place / "checkpoint-2"),
            output,
            10**9,
            Journal(output, "masters"),
            ProgressCallbacks(),
        )
        written, live = (
            load_file(output / "model.safetensors"),
            torch.load(checkpoints / f"{place}.pt"),
        )
        assert all(
            torch.equal(written[name], values.reshape(written[name].shape))
            for name, values in live.items()
        )


def write_checkpoint(
    folder: Path, slices: list[list[tuple[str, int, int]]], numel: int = 10
) -> Path:
    """A checkpoint by hand: of each rank, which elements of which parameter it holds; ``w`` is (2,
    5), ``b`` a buffer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = torch.arange(10.0)
    save_file(
        {"w": values.reshape(2, 5).bfloat16(), "b": torch.arange(3)}, folder / "model.safetensors"
    )
    for rank, held in enumerate(slices):
        tensors: dict[str, torch.Tensor] = {}
        where = {}
        for name, start, count in held:
            where[name] = [start, count, numel]
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                tensors[f"{name}/{kind}"] = (
                    values[start : start + count].clone() if kind == "master" else torch.ones(count)
                )
        file = folder / f"optimizer-{rank:05d}-of-{len(slices):05d}.safetensors"
        save_file(tensors, file, metadata={"llmtune_slices": json.dumps(where)})
    return folder


def test_what_was_not_trained_comes_from_the_model_files(tmp_path: Path) -> None:
    source = MasterWeightsSource(write_checkpoint(tmp_path / "c", [[("w", 0, 3)], [("w", 3, 7)]]))
    assert source.specs["b"] == TensorSpec("b", torch.int64, (3,))
    assert torch.equal(read_whole(source, "b"), torch.arange(3))
    assert torch.equal(read_whole(source, "w"), torch.arange(10.0).reshape(2, 5))


@pytest.mark.parametrize(
    ("slices", "part"),
    [
        (
            [[("w", 0, 3)], [("w", 4, 6)]],
            "master weights of w are not complete: elements 3 to 4 of 10 are missing",
        ),
        ([[("w", 0, 5)], [("w", 4, 6)]], "elements 4 to 5 of 10 are there twice"),
        ([[("w", 0, 5)], [("w", 5, 4)]], "w are not complete: it has 10 elements, and 9 are there"),
        ([[("w", 0, 10)], [("v", 0, 10)]], "v has master weights and is not in the model files"),
    ],
)
def test_slices_that_make_no_parameter_are_named(
    tmp_path: Path, slices: list[list[tuple[str, int, int]]], part: str
) -> None:
    with pytest.raises(ExportError, match=part) as caught:
        MasterWeightsSource(write_checkpoint(tmp_path / "c", slices))
    assert caught.value.exit_code == 6


def test_files_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", [[("w", 0, 3)], [("w", 3, 7)]])
    shutil.copyfile(
        folder / "optimizer-00000-of-00002.safetensors",
        folder / "optimizer-00002-of-00004.safetensors",
    )
    with pytest.raises(ExportError, match="state files of 2 and of 4 ranks"):
        MasterWeightsSource(folder)
    (folder / "optimizer-00002-of-00004.safetensors").unlink()
    last = folder / "optimizer-00001-of-00002.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[:-4])
    with pytest.raises(ExportError, match="optimizer-00001-of-00002.safetensors is cut off"):
        MasterWeightsSource(folder)
    last.unlink()
    with pytest.raises(
        ExportError, match="optimizer-00001-of-00002.safetensors of 2 state files is missing"
    ):
        MasterWeightsSource(folder)
    with pytest.raises(
        ExportError, match="has 10 elements in the model files and 12 in its masters"
    ):
        MasterWeightsSource(write_checkpoint(tmp_path / "other", [[("w", 0, 10)]], numel=12))
    save_file({"w/master": torch.ones(2)}, last)
    with pytest.raises(ExportError, match="is not a state file of llmtune"):
        MasterWeightsSource(folder)


@pytest.mark.process
def test_a_runs_result_finds_the_checkpoint_that_it_was_made_from(
    checkpoints: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoints / "3-none" / "checkpoint-2", checkpoint)
    result = tmp_path / "model"
    link_result(checkpoint, result)
    assert find_master_weights(result) == find_master_weights(checkpoint) == checkpoint
    request = ExportRequest(
        base=result, base_name="tiny", adapter=None, run=tmp_path, output=tmp_path / "out"
    )
    stored = open_export_model(request, ExportConfig())
    fine = open_export_model(request, ExportConfig(dtype=ExportDtype.fp32))
    assert stored.dtype == torch.bfloat16
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(read_whole(fine.source, name).bfloat16(), read_whole(stored.source, name))
    assert not torch.equal(read_whole(fine.source, name), read_whole(stored.source, name).float())
    shutil.rmtree(checkpoint)
    assert find_master_weights(result) is None


def test_a_folder_without_masters_is_told_from_one_with(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", [[("w", 0, 10)]])
    assert has_master_weights(folder)
    (folder / "model.safetensors").unlink()
    assert not has_master_weights(folder), "an adapter's checkpoint has states and no model"
    with pytest.raises(ExportError, match="no whole model"):
        MasterWeightsSource(folder)
    assert not has_master_weights(tmp_path / "nowhere")
    with pytest.raises(ExportError, match="no master weights"):
        MasterWeightsSource(tmp_path)


def test_a_block_in_one_piece_is_no_copy(tmp_path: Path) -> None:
    values = torch.arange(12.0)
    whole = PiecedTensor(TensorSpec("t", torch.float32, (3, 4)), (TensorSlice(0, values),))
    (block,) = whole.blocks()
    assert block.data_ptr() == values.data_ptr()
    halves = PiecedTensor(whole.spec, (TensorSlice(0, values[:5]), TensorSlice(5, values[5:])))
    assert torch.equal(next(halves.blocks()), values.reshape(3, 4))
    scalar = PiecedTensor(TensorSpec("s", torch.float32, ()), (TensorSlice(0, values[7:8]),))
    assert torch.equal(next(scalar.blocks()), torch.tensor(7.0))
    assert find_gap([], 1) == "it has 1 elements, and 0 are there"
