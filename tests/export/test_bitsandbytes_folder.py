"""Folders in bitsandbytes' 4 bits: written with transformers' bits, read as the plain tensors that
they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmtune.config.groups.export import ExportConfig
from llmtune.errors import ExportError
from llmtune.export.export_model import ExportModel
from llmtune.export.merge.merged_source import MergedSource
from llmtune.export.merge.peft_adapter import read_adapter
from llmtune.export.open_model import open_export_model
from llmtune.export.pipeline import run_export, write_files
from llmtune.export.publish.shards import Journal
from llmtune.export.request import ExportRequest
from llmtune.export.sources.bitsandbytes_base import Bnb4bitSource, open_base
from llmtune.export.sources.nf4 import Nf4RoundTripSource, quantized_names
from llmtune.export.sources.tensor_source import SafetensorsSource, TensorSource, read_whole
from tests.export.conftest import TOKENS, make_adapter, make_base
from tests.export.test_nf4 import load_in_4bit, plain_weights

KINDS = ["llama", "llama-tied", "llama-bias", "gpt2"]


def open_one(base: Path, adapter: Path | None = None) -> ExportModel:
    return open_export_model(
        ExportRequest(
            base=base, base_name="tiny", adapter=adapter, run=None, output=base.with_name("out")
        ),
        ExportConfig(),
    )


def write(export_model: ExportModel, folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = ExportConfig(format="bnb_4bit", **settings)
    write_files(export_model, folder, Journal(folder, "job"), config)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def answer(model: Any) -> torch.Tensor:
    """As in training: in evaluation bitsandbytes takes a kernel on some CPUs that refuses rows of
    48 numbers.
    """
    for module in model.modules():
        module.training = isinstance(module, Linear4bit)
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_written_folder_has_the_bits_of_one_that_transformers_stores(
    kind: str, dtype: torch.dtype, tiny_model: Path, tmp_path: Path
) -> None:
    base = make_base(kind, tmp_path / "base", tiny_model, dtype)
    reference = load_in_4bit(
        base, compute=torch.float16 if dtype == torch.float16 else torch.bfloat16
    )
    reference.save_pretrained(tmp_path / "theirs")
    ours = write(open_one(base), tmp_path / "ours")
    assert_same(tensors_of(ours), tensors_of(tmp_path / "theirs"))
    described, expected = (
        json.loads((folder / "config.json").read_text()) for folder in (ours, tmp_path / "theirs")
    )
    assert described["quantization_config"] == expected["quantization_config"]
    assert described["dtype"] == expected["dtype"]
    assert {file.name for file in base.glob("tokenizer*")} <= {file.name for file in ours.iterdir()}
    assert not list(ours.glob("*offsets*"))
    loaded = AutoModelForCausalLM.from_pretrained(ours)
    assert loaded.is_loaded_in_4bit
    assert torch.equal(answer(loaded), answer(reference))


def test_an_adapter_is_merged_before_it_is_quantized(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(
        tiny_model, tmp_path / "adapter", torch.bfloat16, modules_to_save=["lm_head"]
    )
    merged = run_export(
        ExportRequest(
            base=tiny_model, base_name="tiny", adapter=adapter, run=None, output=tmp_path / "merged"
        ),
        ExportConfig(),
    )
    load_in_4bit(merged).save_pretrained(tmp_path / "theirs")
    ours = write(open_one(tiny_model, adapter), tmp_path / "ours")
    assert_same(tensors_of(ours), tensors_of(tmp_path / "theirs"))


def test_a_tied_output_that_an_adapter_unties_stays_unquantized(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = make_base("llama-tied", tmp_path / "base", tiny_model, torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", torch.bfloat16, modules_to_save=["lm_head"])
    ours = write(open_one(base, adapter), tmp_path / "ours")
    assert tensors_of(ours)["lm_head.weight"].dtype == torch.bfloat16
    merged = run_export(
        ExportRequest(
            base=base, base_name="tiny", adapter=adapter, run=None, output=tmp_path / "merged"
        ),
        ExportConfig(),
    )
    assert torch.equal(
        answer(AutoModelForCausalLM.from_pretrained(ours)), answer(load_in_4bit(merged))
    )


def test_shards_load_wherever_they_part_a_weight_from_its_scales(
    tiny_model: Path, tmp_path: Path
) -> None:
    one = write(open_one(tiny_model), tmp_path / "one")
    many = write(open_one(tiny_model), tmp_path / "many", max_shard_bytes=3_000)
    index = json.loads((many / "model.safetensors.index.json").read_text())["weight_map"]
    parted = [
        name
        for name in index
        if f"{name}.absmax" in index and index[name] != index[f"{name}.absmax"]
    ]
    assert parted
    assert_same(tensors_of(many), tensors_of(one))
    assert torch.equal(
        answer(AutoModelForCausalLM.from_pretrained(many)),
        answer(AutoModelForCausalLM.from_pretrained(one)),
    )


class Ending:
    """A source that remembers what was read, and ends after a number of tensors."""

    def __init__(self, source: TensorSource, readings: int) -> None:
        self.specs = source.specs
        self.read: list[str] = []
        self._source, self._readings = source, readings

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        if len(self.read) == self._readings:
            raise OSError("the disk is gone")
        self.read.append(name)
        yield from self._source.blocks(name)


def test_what_was_killed_goes_on_with_the_shard_that_it_was_in(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtune.export.publish.shards._MOST_SHARDS", 1)
    whole = open_one(tiny_model)
    expected = write(whole, tmp_path / "whole", max_shard_bytes=20_000)
    folder = tmp_path / "killed"
    first = Ending(
        whole.source, len(quantized_names(tiny_model, whole.source)) + len(whole.source.specs) // 2
    )
    with pytest.raises(OSError, match="the disk is gone"):
        write(replace(whole, source=first), folder, max_shard_bytes=20_000)
    done = {
        name: (folder / name).stat().st_ino
        for name in Journal(folder, "job").entries
        if name.startswith("model-")
    }
    second = Ending(whole.source, -1)
    write(replace(whole, source=second), folder, max_shard_bytes=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    open_shards = [
        name for name, shard in index.items() if shard not in done and "quant_state" not in name
    ]
    finished = {
        name
        for name in whole.source.specs
        if not any(part.startswith(name) for part in open_shards)
    }
    assert len(finished) > 3
    assert not finished & set(second.read), (
        "neither for the means of scales, nor for finished shards"
    )
    assert {name: (folder / name).stat().st_ino for name in done} == done
    for file in expected.iterdir():
        if file.name != "journal.jsonl":
            assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_4_bit_folder_is_read_as_the_plain_tensors_that_it_stands_for(
    kind: str, dtype: torch.dtype, tiny_model: Path, tmp_path: Path
) -> None:
    base = make_base(kind, tmp_path / "base", tiny_model, dtype)
    model = load_in_4bit(base)
    expected, _ = plain_weights(model)
    model.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    source = open_base(tmp_path / "packed")
    assert isinstance(source, Bnb4bitSource)
    plain = SafetensorsSource(base)
    assert source.specs.keys() == plain.specs.keys()
    for name, spec in plain.specs.items():
        assert source.specs[name] == spec
        assert torch.equal(read_whole(source, name), expected[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {"bnb_4bit_use_double_quant": False},
        {"bnb_4bit_quant_type": "fp4"},
        {"bnb_4bit_quant_storage": torch.bfloat16},
        {"llm_int8_skip_modules": ["q_proj", "lm_head"]},
    ],
)
def test_other_ways_of_4_bits_are_read_too(
    settings: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    model = load_in_4bit(tiny_model, **settings)
    model.save_pretrained(tmp_path / "packed")
    source = Bnb4bitSource(tmp_path / "packed")
    for module in model.modules():
        if hasattr(module, "quant_state"):
            module.weight.data = module.weight.data.view(torch.uint8)
    expected, _ = plain_weights(model)
    assert source.specs.keys() == SafetensorsSource(tiny_model).specs.keys()
    assert all(torch.equal(read_whole(source, name), expected[name]) for name in source.specs)


def test_an_adapter_merges_onto_a_4_bit_folder_as_onto_nf4(
    tiny_model: Path, tmp_path: Path
) -> None:
    adapter = read_adapter(make_adapter(tiny_model, tmp_path / "adapter", torch.bfloat16))
    load_in_4bit(tiny_model).save_pretrained(tmp_path / "packed")
    stored = SafetensorsSource(tiny_model)
    onto_nf4 = MergedSource(
        Nf4RoundTripSource(stored, quantized_names(tiny_model, stored)), adapter, "lm_head.weight"
    )
    onto_folder = MergedSource(open_base(tmp_path / "packed"), adapter, "lm_head.weight")
    assert onto_folder.changed.keys() == onto_nf4.changed.keys()
    assert all(
        torch.equal(read_whole(onto_folder, n), read_whole(onto_nf4, n)) for n in onto_nf4.specs
    )


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            r"bitsandbytes 8-bit.*base=.*dequantize\(\)",
        ),
        ({"load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"quant_method": "gptq", "bits": 4}, r"quantized \(gptq\).*base="),
        ({"quant_method": "awq", "bits": 4}, r"quantized \(awq\).*base="),
        ({"quant_method": "fp8"}, r"quantized \(fp8\)"),
    ],
)
def test_other_quantizations_are_refused(
    settings: dict[str, Any], part: str, tiny_model: Path, tmp_path: Path
) -> None:
    base = make_base("llama", tmp_path / "base", tiny_model)
    assert isinstance(open_base(base), SafetensorsSource)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    for opens in (open_base, Bnb4bitSource):
        with pytest.raises(ExportError, match=part) as caught:
            opens(base)
        assert caught.value.exit_code == 6


def test_a_4_bit_folder_without_its_scales_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    load_in_4bit(tiny_model).save_pretrained(tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    whole, weight = load_file(file), "model.layers.0.mlp.up_proj.weight"
    state = f"{weight}.quant_state.bitsandbytes__nf4"

    def check(changed: dict[str, torch.Tensor], part: str) -> None:
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(ExportError, match=part):
            read_whole(open_base(tmp_path / "packed"), weight)

    check(
        {name: tensor for name, tensor in whole.items() if name != f"{weight}.absmax"},
        "incomplete without .*absmax",
    )
    check(
        {name: tensor for name, tensor in whole.items() if name != weight},
        "incomplete without .*up_proj.weight",
    )
    check(
        {name: tensor for name, tensor in whole.items() if name != state},
        "packed in 4 bits and have no quant_state",
    )
    check({**whole, state: whole[state][:-9]}, "is damaged")
    check(
        {name: t for name, t in whole.items() if name != f"{weight}.nested_quant_map"},
        "statistics .* are damaged",
    )
