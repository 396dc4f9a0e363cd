"""NF4 and back: bitsandbytes' bits, the layers that transformers picks, and an adapter merged onto
what its training saw.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from llmtune.config.compose import compose_config
from llmtune.config.groups.export import ExportConfig, MergeOnto
from llmtune.config.stored import dump_yaml
from llmtune.errors import ExportError
from llmtune.export.merge.merged_source import MergedSource
from llmtune.export.merge.peft_adapter import read_adapter
from llmtune.export.open_model import open_export_model
from llmtune.export.request import ExportRequest
from llmtune.export.sources.nf4 import (
    Nf4RoundTripSource,
    dequantize,
    mean_scale,
    quantize,
    quantized_names,
)
from llmtune.export.sources.tensor_source import (
    SafetensorsSource,
    TensorSource,
    read_whole,
)
from llmtune.storage import layout
from tests.export.conftest import TOKENS, copy_tokenizer, make_adapter, make_base

#: Rows of 48 and 112 numbers; the tiny model's are multiples of 64.
KINDS = ["tiny", "llama", "llama-tied", "llama-bias", "gpt2"]


def load_in_4bit(
    base: Path, dtype: Any = "auto", compute: torch.dtype = torch.bfloat16, **settings: Any
) -> Any:
    """The reference: transformers quantizes while it loads."""
    given = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **settings}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute, **given)
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=config
    ).eval()


def stand_for(packed: torch.Tensor, state: Any) -> torch.Tensor:
    """The formula: the code of each half byte, times the scale of its 64."""
    scales = (
        functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        if state.nested
        else state.absmax
    )
    halves = (
        torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], dim=1).reshape(-1).long()
    )
    numbers: torch.Tensor = (
        state.code[halves] * scales.repeat_interleave(state.blocksize)[: len(halves)]
    )
    return numbers[: state.shape.numel()].reshape(state.shape).to(state.dtype)


def plain_weights(model: Any) -> tuple[dict[str, torch.Tensor], set[str]]:
    """All weights of a 4-bit model under the names and in the orientation of the unquantized one,
    and those that were not.
    """
    tensors, quantized = {}, set()
    for name, module in model.named_modules():
        for part, tensor in module._parameters.items():
            if tensor is not None:
                tensors[f"{name}.{part}"] = tensor.data
        if isinstance(module, Linear4bit):
            stored: Any = module.weight
            weight = stand_for(stored.data, stored.quant_state)
            if weight.shape[1] % 64 == 0:
                # Where the rows end with a block; bitsandbytes' kernel for AVX-512 is wrong
                # elsewhere.
                assert torch.equal(
                    weight,
                    functional.dequantize_4bit(stored.data, stored.quant_state),
                )
            is_transposed = issubclass(cast(type, module.source_cls), Conv1D)
            tensors[f"{name}.weight"] = weight.T if is_transposed else weight
            quantized.add(f"{name}.weight")
    return tensors, quantized


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_the_bits_of_a_model_that_transformers_loads_in_4_bits(
    kind: str, dtype: torch.dtype, tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    if kind == "tiny":
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).save_pretrained(base)
    else:
        make_base(kind, base, tiny_model, dtype)
    expected, layers = plain_weights(load_in_4bit(base))
    stored = SafetensorsSource(base)
    names = quantized_names(base, stored)
    assert names.keys() == layers
    assert set(names.values()) == {kind == "gpt2"}
    source = Nf4RoundTripSource(stored, names)
    for name, spec in source.specs.items():
        found = read_whole(source, name)
        assert found.dtype == spec.dtype == dtype
        assert torch.equal(found, expected[name]), name
        assert torch.equal(found, read_whole(stored, name)) == (name not in layers), name


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_base_is_quantized_as_the_run_did(
    stored: torch.dtype, precision: str, double_quant: bool, tiny_model: Path, tmp_path: Path
) -> None:
    """In the dtype of the training, whatever that of the files is."""
    base = make_base("llama", tmp_path / "base", tiny_model, stored)
    trained = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    reference = load_in_4bit(base, dtype=trained, bnb_4bit_use_double_quant=double_quant)
    expected, layers = plain_weights(reference)
    keys = [f"precision={precision}", f"tuner.bnb_4bit_use_double_quant={double_quant}"]
    config = compose_config(["model=tiny", "data.train=rows.jsonl", "tuner=qlora", *keys]).config
    (tmp_path / layout.CONFIG).write_text(dump_yaml(config))
    request = ExportRequest(
        base=base,
        base_name="tiny",
        adapter=make_adapter(base, tmp_path / "adapter"),
        run=tmp_path,
        output=tmp_path / "out",
    )
    source = open_export_model(request, ExportConfig(merge_onto=MergeOnto.nf4)).base
    for name in layers:
        found = read_whole(source, name)
        assert found.dtype == source.specs[name].dtype == stored
        assert torch.equal(found, expected[name].to(stored)), name


def write_tensor(tensor: torch.Tensor, folder: Path) -> TensorSource:
    folder.mkdir(exist_ok=True)
    save_file({"w": tensor}, folder / "model.safetensors")
    return SafetensorsSource(folder)


@pytest.mark.parametrize(
    "shape", [(1, 2), (2, 1), (7, 10), (130, 34), (300, 48), (65, 63), (13, 4096), (1000, 64)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_at_a_time_have_the_bits_of_the_whole(
    shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    tensor = torch.randn(shape).to(dtype)
    packed, state = functional.quantize_4bit(tensor, compress_statistics=True, quant_type="nf4")
    monkeypatch.setattr("llmtune.storage.tensors.row_blocks.BLOCK_ELEMENTS", 5 * shape[1])
    monkeypatch.setattr("llmtune.storage.tensors.row_blocks._LEAST_ROWS", 1)
    monkeypatch.setattr("llmtune.export.sources.nf4.CHUNK_ELEMENTS", 128)
    source = write_tensor(tensor, tmp_path)
    ours, described = quantize(source, "w", transposed=False)
    assert torch.equal(ours, packed)
    assert torch.equal(described.absmax, state.absmax)
    assert torch.equal(described.offset, state.offset)
    assert mean_scale(source, "w", transposed=False) == state.offset.item()
    rows = list(dequantize(ours, described, transposed=False))
    assert torch.equal(torch.cat(rows), stand_for(packed, state))
    assert len(rows) > 1 or shape[0] * shape[1] < 20 * 64


def store(source: TensorSource, like: Path, folder: Path) -> Path:
    folder.mkdir()
    save_file(
        {name: read_whole(source, name) for name in source.specs},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text((like / "config.json").read_text())
    return folder


def in_training(model: Any, adapter: Path) -> Any:
    """With an adapter, as it runs in training; in evaluation bitsandbytes takes a kernel on some
    CPUs that computes in bf16.
    """
    return PeftModel.from_pretrained(model, adapter).train()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "r": 8}, {"use_dora": True}])
def test_a_model_merged_onto_nf4_answers_as_the_training_did(
    settings: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    trained = in_training(load_in_4bit(base, compute=torch.float32), adapter)
    stored = SafetensorsSource(base)
    onto: dict[str, TensorSource] = {
        "nf4": Nf4RoundTripSource(stored, quantized_names(base, stored)),
        "original": stored,
    }
    with torch.no_grad():
        expected = trained(TOKENS).logits
        distances = {}
        for name, source in onto.items():
            folder = store(
                MergedSource(source, read_adapter(adapter), "lm_head.weight"), base, tmp_path / name
            )
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            distances[name] = (model(TOKENS).logits - expected).abs().max().item()
        peft_merged = trained.merge_and_unload()(TOKENS).logits
    assert distances["nf4"] < 1e-4
    assert distances["original"] > 1e-2
    assert (peft_merged - expected).abs().max() > 1e-2, "peft quantizes the sum again"


def test_a_base_in_4_bits_computes_with_these_very_bits(tiny_model: Path, tmp_path: Path) -> None:
    stored = SafetensorsSource(tiny_model)
    folder = store(
        Nf4RoundTripSource(stored, quantized_names(tiny_model, stored)),
        tiny_model,
        tmp_path / "round",
    )
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).train()
    with torch.no_grad():
        assert torch.equal(plain(TOKENS).logits, load_in_4bit(tiny_model).train()(TOKENS).logits)


def test_what_cannot_be_quantized_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    source = write_tensor(torch.ones(4, 64, dtype=torch.int32), tmp_path / "one")
    with pytest.raises(ExportError, match=r"not of w \(torch.int32\)"):
        Nf4RoundTripSource(source, {"w": False})
    with pytest.raises(ExportError, match="not there: v"):
        Nf4RoundTripSource(source, {"v": False})
    base = make_base("llama", tmp_path / "base", tiny_model)
    tensors = load_file(base / "model.safetensors")
    save_file(
        {name.replace("up_proj", "w3"): tensor for name, tensor in tensors.items()},
        base / "model.safetensors",
    )
    with pytest.raises(ExportError, match=r"2 linear layers .* model.layers.0.mlp.up_proj.weight"):
        quantized_names(base, SafetensorsSource(base))
    (base / "config.json").write_text('{"model_type": "of_next_year"}')
    with pytest.raises(ExportError, match="cannot tell which layers are linear") as caught:
        quantized_names(base, SafetensorsSource(base))
    assert caught.value.exit_code == 6


def test_files_that_leave_out_the_first_part_of_names_are_matched(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = make_base("gpt2", tmp_path / "base", tiny_model)
    tensors = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(short, base / "model.safetensors", {"format": "pt"})
    copy_tokenizer(tiny_model, base)
    names = quantized_names(base, SafetensorsSource(base))
    assert {f"transformer.{name}" for name in names} == plain_weights(load_in_4bit(base))[1]


@pytest.mark.process
@pytest.mark.usefixtures("started_cold")
def test_loading_bitsandbytes_says_nothing() -> None:
    code = "from llmtune.model.nf4.nf4_slices import load_bitsandbytes; load_bitsandbytes()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
