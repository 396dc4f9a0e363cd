"""Merging: exact, streamed, and refused where anything does not match."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmtune.checkpoint.tensor_file import TensorFile, TensorSpec, plan_shards
from llmtune.config.schema import ExportConfig, ExportFormat
from llmtune.errors import ExportError
from llmtune.export.job import ExportRequest, run_export
from llmtune.export.merge import merge, read_adapter


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model in fp32, where merging is exact."""
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).save_pretrained(folder)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path / "adapter"
    wrapped.save_pretrained(folder)
    return folder


def export(base: Path, adapter: Path | None, output: Path, **settings: Any) -> Path:
    request = ExportRequest(base, "tiny", adapter, None, output)
    return run_export(request, ExportConfig(**settings))


def change(adapter: Path, **tensors: torch.Tensor | None) -> None:
    file = adapter / "adapter_model.safetensors"
    found: dict[str, Any] = {**load_file(file), **tensors}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, file)


def test_a_merge_is_bit_identical_to_pefts(base: Path, adapter: Path, tmp_path: Path) -> None:
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    reference = reference.merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(export(base, adapter, tmp_path / "out"), dtype=torch.float32)
    expected = reference.state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids = torch.arange(20)[None]
    assert torch.equal(merged(ids).logits, reference(ids).logits)


def test_shards_have_an_index_and_load(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = export(base, adapter, tmp_path / "out", max_shard_bytes=100_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    one = AutoModelForCausalLM.from_pretrained(export(base, adapter, tmp_path / "one"))
    many = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))


def test_a_second_export_replaces_the_first_and_nothing_else(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = export(base, adapter, tmp_path / "out")
    export(base, adapter, folder)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(ExportError, match="exists and is not an export"):
        export(base, adapter, other)
    assert (other / "thesis.txt").read_text() == "precious"
    with pytest.raises(ExportError, match="holds what is exported"):
        export(base, adapter, adapter)
    with pytest.raises(ExportError, match="exists and is not an export"):
        export(base, None, adapter)


def test_a_merged_model_stops_where_answers_were_trained_to_end(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "temperature": 0.6}))
    settings = json.loads((export(base, adapter, tmp_path / "out") / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [0, 2]


@pytest.mark.parametrize(
    ("tensors", "part"),
    [
        ({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}, "no LoRA pair"),
        ({"something.else": torch.ones(1)}, "no LoRA pair, such as something.else"),
        (
            {
                "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 64),
                "base_model.model.model.layers.9.mlp.up_proj.lora_B.weight": torch.ones(128, 4),
            },
            "layers.9.mlp.up_proj.weight is not in the base",
        ),
    ],
)
def test_what_matches_nothing_is_an_error_and_publishes_nothing(
    base: Path, adapter: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], part: str
) -> None:
    change(adapter, **tensors)
    with pytest.raises(ExportError, match=part) as caught:
        export(base, adapter, tmp_path / "out")
    assert caught.value.exit_code == 6
    assert not list(tmp_path.glob("out*"))


def test_an_adapter_of_another_kind_or_none_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "use_dora": True}))
    with pytest.raises(ExportError, match="use_dora is not supported"):
        read_adapter(adapter)
    file.write_text(json.dumps({**settings, "use_rslora": True}))
    assert read_adapter(adapter).scale == 12 / 2
    (adapter / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ExportError, match="cannot be read as an adapter"):
        merge(base, read_adapter(adapter), tmp_path, 10**9)


def test_formats_without_sense_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="has no adapter"):
        export(base, None, tmp_path / "out", format=ExportFormat.adapter)
    with pytest.raises(ExportError, match="export=none writes nothing"):
        export(base, adapter, tmp_path / "out", format=ExportFormat.none)
    assert (export(base, adapter, tmp_path / "a", format=ExportFormat.adapter) / "adapter_model.safetensors").is_file()


def test_a_full_model_is_exported_as_it_is(base: Path, tmp_path: Path) -> None:
    folder = export(base, None, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), AutoModelForCausalLM.from_pretrained(base).parameters(), strict=True)
    )
    assert "Load it" in (folder / "README.md").read_text()


def test_a_tensor_file_reads_back_whole_and_in_pieces(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.randn(2, 2).bfloat16(), "empty": torch.zeros(0)}
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with TensorFile(tmp_path / "x.safetensors", specs) as file:
        file.write(tensors["a"][:1])
        file.write(tensors["a"][1:])
        for name in ("b", "c", "empty"):
            file.write(tensors[name])
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    shards = plan_shards(specs, 70)
    assert [name for name, _ in shards] == [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    assert [spec.name for _, shard in shards for spec in shard] == list(tensors)
