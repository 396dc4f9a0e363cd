"""DeepSpeed's checkpoints, read without it: the bits of its own conversion, nothing executed, and
names for what is wrong.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmtune.errors import ExportError
from llmtune.export.merge.merged_source import MergedSource
from llmtune.export.merge.peft_adapter import read_adapter
from llmtune.export.progress import ProgressCallbacks
from llmtune.export.publish.shards import Journal, write_shards
from llmtune.export.sources.deepspeed.checkpoint_parts import (
    has_adapter,
    open_adapter_part,
    open_base_part,
    open_model_part,
    write_adapter,
)
from llmtune.export.sources.deepspeed.pickle_reader import Inert, read_archive
from llmtune.export.sources.deepspeed.step_folder import find_step_folder, is_zero_checkpoint
from llmtune.export.sources.deepspeed.zero_source import ZeroSource
from llmtune.export.sources.tensor_source import RetypedSource, read_whole
from tests.support import run, train_engines

FROZEN = ["model.norm", "layers.0.mlp"]

#: Name -> what is special about the checkpoint.
KINDS: dict[str, dict[str, Any]] = {
    **{
        f"{stage} {tuner}{' without frozen' if exclude else ''}": {
            "stage": stage,
            "exclude": exclude,
            **({"lora": {}} if tuner == "lora" else {"frozen": FROZEN}),
        }
        for stage in (1, 2, 3)
        for tuner in ("full", "lora")
        for exclude in (False, True)
    },
    "2 fp32": {"stage": 2, "precision": "fp32"},
    "2 aligned": {"stage": 2, "zero": {"parameter_alignment": True}},
    "2 round robin": {"stage": 2, "zero": {"round_robin_gradients": True}},
    "3 sub-groups": {"stage": 3, "zero": {"sub_group_size": 700}},
    "3 saved module": {
        "stage": 3,
        "lora": {"modules_to_save": ["lm_head"], "use_dora": True, "bias": "all"},
    },
}
OF_THREE_RANKS: dict[str, dict[str, Any]] = {
    "1 three ranks": {"stage": 1, "frozen": FROZEN},
    "2 three ranks": {"stage": 2, "lora": {}},
    "3 three ranks": {"stage": 3, "frozen": FROZEN},
}
ALL = [*KINDS, *OF_THREE_RANKS]

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of every kind, and one without ZeRO, written by DeepSpeed."""
    folder = tmp_path_factory.mktemp("zero")
    two = {**KINDS, "0 full": {"stage": 0}}
    for ranks, kinds in ((2, two), (3, OF_THREE_RANKS)):
        tasks = [{**kind, "folder": str(folder / name)} for name, kind in kinds.items()]
        train_engines(tasks, ranks, folder, timeout=900, module="tests.export.zero_worker")
    return folder


def convert(folder: Path) -> dict[str, torch.Tensor]:
    """DeepSpeed's own conversion."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    found: dict[str, torch.Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    return found


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal with dtype, shape, and the sign of zero."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return torch.equal(*(t.detach().reshape(-1).view(torch.uint8) for t in (found, expected)))


def copy(checkpoints: Path, name: str, tmp_path: Path) -> Path:
    """A checkpoint to be spoilt, and the folder with its ranks' files."""
    shutil.copytree(checkpoints / name, tmp_path / "copy")
    return tmp_path / "copy" / "global_step2"


@pytest.mark.parametrize("name", ALL)
def test_tensors_have_the_bits_of_deepspeeds_own_conversion(
    name: str, checkpoints: Path, monkeypatch: Any
) -> None:
    expected = convert(checkpoints / name)
    module = read_archive(model_states(checkpoints / name))["module"]
    for block_elements in (1 << 22, 50):
        monkeypatch.setattr("llmtune.storage.tensors.row_blocks.BLOCK_ELEMENTS", block_elements)
        monkeypatch.setattr("llmtune.storage.tensors.row_blocks._LEAST_ROWS", 1)
        source = ZeroSource(checkpoints / name)
        assert source.world_size == (3 if name in OF_THREE_RANKS else 2)
        for tensor, values in expected.items():
            found = read_whole(source, tensor)
            if tensor in ("table", "counts"):
                # As stored; DeepSpeed's conversion makes every buffer fp32.
                assert found.dtype == module[tensor].dtype
                found = found.to(values.dtype)
            assert same_bits(found, values), tensor
        # What that conversion leaves out is what stage 1 keeps in the module alone, and parameters
        # without elements.
        for tensor in source.specs.keys() - expected.keys():
            stored = module[source.shared.get(tensor, tensor)]
            assert name.startswith("1 ") or not stored.numel, tensor
            assert same_bits(read_whole(source, tensor), stored.open()), tensor


def model_states(folder: Path) -> Path:
    """Rank 0's."""
    return next(
        file
        for file in (folder / "global_step2").glob("*_model_states.pt")
        if "rank_1" not in file.name and "rank_2" not in file.name
    )


def test_tests_cover_what_is_hard(checkpoints: Path) -> None:
    """Padding, parameters across the ends of partitions and of flat tensors, several groups, tied
    and frozen ones.
    """
    flats = read_archive(
        next((checkpoints / "2 full" / "global_step2").glob("*rank_0*_optim_states.pt"))
    )
    groups = flats["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    assert len(groups) == 2
    source = ZeroSource(checkpoints / "2 full")
    assert any(len(tensor.pieces) == 2 for tensor in source._tensors.values())
    assert source.shared == {"llama.lm_head.weight": "llama.model.embed_tokens.weight"}
    assert {"table", "counts"} <= source.specs.keys()
    assert "scratch" not in source.specs
    for name in ("1 three ranks", "2 full"):
        states = [
            read_archive(file)["optimizer_state_dict"]
            for file in (checkpoints / name).rglob("*_optim_states.pt")
        ]
        assert any(sum(state["group_paddings"]) for state in states), "the last rank is filled up"
    aligned = [
        read_archive(file) for file in (checkpoints / "2 aligned").rglob("*_optim_states.pt")
    ]
    assert any(map(sum, aligned[0]["optimizer_state_dict"]["param_alignment_paddings"]))
    for name in ("3 lora", "3 three ranks"):
        thirds = ZeroSource(checkpoints / name)
        assert any(
            math.prod(thirds.specs[tensor].shape) % thirds.world_size for tensor in thirds.trained
        )
    sub_groups = ZeroSource(checkpoints / "3 sub-groups")
    assert any(len(tensor.pieces) >= 2 for tensor in sub_groups._tensors.values())
    frozen = [name for name in source.specs if name not in source.trained and "mlp" in name]
    assert len(frozen) == 3
    assert {source.specs[name].dtype for name in frozen} == {torch.bfloat16}


def test_written_shards_are_deepspeeds(checkpoints: Path, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict

    for name in ("2 full without frozen", "3 full"):
        theirs, ours = tmp_path / name / "theirs", tmp_path / name / "ours"
        convert_zero_checkpoint_to_state_dict(
            str(checkpoints / name),
            str(theirs),
            dtype="bf16",
            safe_serialization=False,
            max_shard_size=None,
        )
        ours.mkdir(parents=True)
        write_shards(
            RetypedSource(ZeroSource(checkpoints / name), torch.bfloat16),
            ours,
            5_000,
            Journal(ours, name),
            ProgressCallbacks(),
        )
        written = {
            key: tensor
            for file in ours.glob("*.safetensors")
            for key, tensor in load_file(file).items()
        }
        assert len(list(ours.glob("*.safetensors"))) > 1
        expected = torch.load(theirs / "pytorch_model.bin")
        assert written.keys() - expected.keys() <= {"nothing"}
        assert all(same_bits(written[key], tensor) for key, tensor in expected.items())


def test_tied_tensors_of_a_model_are_written_once(checkpoints: Path) -> None:
    source = ZeroSource(checkpoints / "3 full")
    part = open_model_part(source)
    assert source.specs.keys() - part.specs.keys() == {"llama.lm_head.weight"}
    assert all(same_bits(read_whole(part, name), read_whole(source, name)) for name in part.specs)


def test_every_way_to_name_a_checkpoint_finds_it(checkpoints: Path, tmp_path: Path) -> None:
    folder = checkpoints / "2 full"
    assert (
        find_step_folder(folder)
        == find_step_folder(folder / "global_step2")
        == folder / "global_step2"
    )
    assert is_zero_checkpoint(folder)
    assert is_zero_checkpoint(folder / "global_step2")
    assert not is_zero_checkpoint(tmp_path)
    assert not is_zero_checkpoint(tmp_path / "nowhere")
    step = copy(checkpoints, "2 full", tmp_path)
    (step.parent / "latest").unlink()
    assert find_step_folder(step.parent) == step, "the only one"
    shutil.copytree(step, step.with_name("global_step4"))
    with pytest.raises(ExportError, match="several checkpoints: global_step2, global_step4"):
        ZeroSource(step.parent)
    (step.parent / "latest").write_text("global_step4\n")
    assert find_step_folder(step.parent).name == "global_step4"
    (step.parent / "latest").write_text("global_step9")
    with pytest.raises(ExportError, match="global_step9, which holds no checkpoint"):
        ZeroSource(step.parent)
    (step.parent / "latest").write_text("../elsewhere")
    with pytest.raises(ExportError, match="not a folder inside"):
        ZeroSource(step.parent)
    with pytest.raises(ExportError, match="holds no checkpoint of DeepSpeed"):
        ZeroSource(tmp_path / "nowhere")


@pytest.mark.usefixtures("started_cold")
def test_deepspeed_is_not_needed(checkpoints: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from llmtune.export.sources.deepspeed.zero_source"
        " import ZeroSource; source = ZeroSource(Path(sys.argv[1])); assert source.trained;"
        " print(sum(block.numel() for name in source.specs for block in source.blocks(name)),"
        " 'deepspeed' in sys.modules)"
    )
    for name in ("1 lora", "3 full"):
        done = run([sys.executable, "-c", program, str(checkpoints / name)])
        assert done.code == 0, done.err
        assert done.out.split()[1] == "False"


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_a_malicious_checkpoint_executes_nothing(checkpoints: Path, tmp_path: Path) -> None:
    step, marker = copy(checkpoints, "2 lora", tmp_path), tmp_path / "executed"
    expected = convert(step.parent)
    for file in step.glob("*.pt"):
        content = torch.load(file, weights_only=False)
        torch.save({**content, "lr_scheduler": Evil(f"touch {marker}")}, file)
    source = ZeroSource(step.parent)
    assert all(same_bits(read_whole(source, name), values) for name, values in expected.items())
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists(), "it would have"
    marker.unlink()
    content = read_archive(file)
    assert isinstance(content["lr_scheduler"], Inert)
    torch.save(
        {"module": Evil(f"touch {marker}"), "param_shapes": [Evil(f"touch {marker}")]},
        model_states(step.parent),
    )
    with pytest.raises(ExportError, match="names no parameters of ZeRO"):
        ZeroSource(step)
    assert not marker.exists()


def remove_last_rank(step: Path) -> None:
    next(step.glob("*rank_1_mp_rank_00_optim_states.pt")).unlink()


def remove_first_rank(step: Path) -> None:
    next(step.glob("*rank_0_mp_rank_00_optim_states.pt")).unlink()


def remove_model_states(step: Path) -> None:
    model_states(step.parent).unlink()


def truncate(step: Path) -> None:
    file = next(step.glob("*rank_1_mp_rank_00_optim_states.pt"))
    file.write_bytes(file.read_bytes()[:-3000])


def add_old_rank(step: Path) -> None:
    shutil.copyfile(
        next((step.parent.parent / "three").glob("*rank_2*_optim_states.pt")),
        step / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt",
    )


def add_file(name: str) -> Callable[[Path], None]:
    return lambda step: (step / name).touch()


def add_precision(step: Path) -> None:
    file = next(step.glob("*rank_0*_optim_states.pt"))
    shutil.copyfile(file, step / file.name.removeprefix("bf16_"))


def lengthen(step: Path) -> None:
    file = next(step.glob("*rank_1*_optim_states.pt"))
    content = torch.load(file, weights_only=False)
    flats = content["optimizer_state_dict"]
    key = "fp32_flat_groups" if "fp32_flat_groups" in flats else "single_partition_of_fp32_groups"
    flats[key][0] = torch.cat([flats[key][0].detach(), torch.zeros(40)])
    torch.save(content, file)


def add_experts(step: Path) -> None:
    file = model_states(step.parent)
    torch.save(
        {**torch.load(file, weights_only=False), "ds_autoep_layers": [{"num_experts": 4}]}, file
    )


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (remove_last_rank, "was written by 2 ranks, and .*of rank 1 is missing"),
        (remove_first_rank, "of rank 0 is missing"),
        (remove_model_states, "_model_states.pt is missing"),
        (truncate, "rank_1_mp_rank_00_optim_states.pt is cut off"),
        (add_old_rank, "written by 2 ranks and .*rank_2.* by 3"),
        (add_precision, "holds rank 0 twice"),
        (lengthen, "(do not belong together|has .* elements of master weights)"),
        (add_experts, "mixture of experts"),
        (add_file("layer_00-model_00-model_states.pt"), "pipeline parallelism"),
        (add_file("zero_pp_rank_0_mp_rank_01_optim_states.pt"), "tensor parallelism"),
        (add_file("expp_rank_0_mp_rank_00_optim_states.pt"), "mixture of experts"),
        (add_file("layer_0_expert_0_mp_rank_00_model_states.pt"), "mixture of experts"),
    ],
)
def test_what_cannot_be_right_is_refused_with_names(
    stage: int, spoil: Callable[[Path], None], part: str, checkpoints: Path, tmp_path: Path
) -> None:
    step = copy(checkpoints, f"{stage} full", tmp_path)
    shutil.copytree(checkpoints / f"{stage} three ranks" / "global_step2", tmp_path / "three")
    spoil(step)
    with pytest.raises(ExportError, match=part) as caught:
        ZeroSource(step.parent)
    assert caught.value.exit_code == 6


def test_a_frozen_part_that_is_missing_is_named(checkpoints: Path, tmp_path: Path) -> None:
    step = copy(checkpoints, "3 lora", tmp_path)
    (step / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(
        ExportError,
        match="zero_pp_rank_1_mp_rank_00_model_states.pt with frozen parameters is missing",
    ):
        ZeroSource(step)


def test_a_checkpoint_of_stage_0_is_refused(checkpoints: Path) -> None:
    assert is_zero_checkpoint(checkpoints / "0 full")
    with pytest.raises(ExportError, match="stage 0"):
        ZeroSource(checkpoints / "0 full")


def test_a_file_of_something_else_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    step = copy(checkpoints, "2 full", tmp_path)
    file = next(step.glob("*rank_1*_optim_states.pt"))
    torch.save(torch.load(file, weights_only=False), file, _use_new_zipfile_serialization=False)
    with pytest.raises(ExportError, match="not in the zip format of torch.save"):
        ZeroSource(step)
    torch.save([1, 2], file)
    with pytest.raises(ExportError, match="holds no master weights"):
        ZeroSource(step)
    file.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ExportError, match="cut off, or not in the zip format"):
        ZeroSource(step)


@pytest.mark.parametrize(
    "name", [name for name in ALL if (KINDS | OF_THREE_RANKS)[name].get("lora") is not None]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_is_written_as_peft_writes_it(
    name: str, checkpoints: Path, tmp_path: Path
) -> None:
    from peft import get_peft_model_state_dict

    from tests.export.zero_worker import make_model

    source = ZeroSource(checkpoints / name)
    assert has_adapter(source)
    assert write_adapter(source, tmp_path / "adapter")
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    model = make_model((KINDS | OF_THREE_RANKS)[name])
    model.load_state_dict({key: read_whole(source, key) for key in source.trained}, strict=False)
    expected = get_peft_model_state_dict(model)
    assert written.keys() == expected.keys()
    for key, values in expected.items():
        assert same_bits(written[key], values.contiguous()), key
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 3
    read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["1 lora", "2 lora", "3 lora", "3 saved module"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_base_below_an_adapter_is_a_model_of_its_own(
    name: str, checkpoints: Path, tmp_path: Path
) -> None:
    from tests.export.zero_worker import make_model

    source = ZeroSource(checkpoints / name)
    base = open_base_part(source)
    plain = make_model(KINDS[name]).unload().state_dict()
    assert base.specs.keys() == plain.keys() - {"lm_head.weight"} or "lm_head" in str(KINDS[name])
    for tensor in base.specs:
        if source.trained.isdisjoint({base._names[tensor]}):
            assert same_bits(read_whole(base, tensor), plain[tensor].bfloat16()), tensor
    write_adapter(source, tmp_path / "adapter")
    merged = MergedSource(base, read_adapter(tmp_path / "adapter"), "lm_head.weight")
    assert any("q_proj.weight" in changed for changed in merged.changed)


def test_a_base_that_is_not_there_is_said(checkpoints: Path, tmp_path: Path) -> None:
    for stage in (1, 2, 3):
        source = ZeroSource(checkpoints / f"{stage} lora without frozen")
        with pytest.raises(ExportError, match="holds the adapter alone .*base="):
            open_base_part(source)
        full = ZeroSource(checkpoints / f"{stage} full")
        assert not has_adapter(full)
        with pytest.raises(ExportError, match="no adapter was trained here"):
            open_adapter_part(full)
    step = copy(checkpoints, "2 lora", tmp_path)
    (step.parent / "adapter_config.json").unlink()
    assert not write_adapter(ZeroSource(step), tmp_path / "adapter"), "peft would not load it"
    assert [file.name for file in (tmp_path / "adapter").iterdir()] == ["adapter_model.safetensors"]
