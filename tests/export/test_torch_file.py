"""``model.pt``: the bits of the safetensors, in a file that torch.load reads without running
code.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune.config.groups.export import ExportConfig, ExportDtype
from llmtune.export.open_model import open_export_model
from llmtune.export.pipeline import run_export, write_files
from llmtune.export.publish.shards import Journal
from llmtune.export.request import ExportRequest
from tests.export.conftest import TOKENS, make_adapter, make_base


def write(base: Path, output: Path, adapter: Path | None = None, **settings: Any) -> Path:
    config = ExportConfig(format="pt", **settings)
    export_model = open_export_model(
        ExportRequest(base=base, base_name="tiny", adapter=adapter, run=None, output=output), config
    )
    output.mkdir()
    write_files(export_model, output, Journal(output, "test"), config)
    return output


def read(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "model.pt", weights_only=True)
    return found


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("dtype", [ExportDtype.auto, ExportDtype.fp16, ExportDtype.fp32])
def test_a_merged_model_is_in_one_file_with_the_bits_of_the_safetensors(
    tiny_model: Path, tmp_path: Path, kind: str, dtype: ExportDtype
) -> None:
    base = make_base(kind, tmp_path / "base", tiny_model, torch.bfloat16)
    settings: dict[str, Any] = {}
    if kind == "gpt2":
        settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    folder = write(base, tmp_path / "out", adapter, dtype=dtype, max_shard_bytes=60_000)
    request = ExportRequest(
        base=base, base_name="tiny", adapter=adapter, run=None, output=tmp_path / "reference"
    )
    expected = load_file(run_export(request, ExportConfig(dtype=dtype)) / "model.safetensors")
    found = read(folder)
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    written = {torch.float16: "float16", torch.float32: "float32", torch.bfloat16: "bfloat16"}
    assert (
        json.loads((folder / "config.json").read_text())["dtype"]
        == written[next(iter(found.values())).dtype]
    )
    assert not [file for file in folder.iterdir() if file.is_dir()]


def test_the_state_dict_makes_the_model_again(tiny_model: Path, tmp_path: Path) -> None:
    base = make_base("llama-tied", tmp_path / "base", tiny_model)
    folder = write(base, tmp_path / "out")
    assert "lm_head.weight" not in read(folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    missing, unexpected = model.load_state_dict(read(folder), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    original = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, original(TOKENS).logits)


def test_each_tensor_has_its_own_storage(tiny_model: Path, tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base", tiny_model)
    tensors = load_file(base / "model.safetensors")
    strange = {
        "steps": torch.tensor(7),
        "none": torch.empty(0, 3),
        "flags": torch.tensor([True, False, True]),
    }
    save_file({**tensors, **strange}, base / "model.safetensors", metadata={"format": "pt"})
    found = read(write(base, tmp_path / "out"))
    assert all(torch.equal(found[name], tensor) for name, tensor in {**tensors, **strange}.items())
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in found.values())
    assert len({tensor.data_ptr() for tensor in found.values() if tensor.numel()}) == len(found) - 1


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize(
    ("dtype", "file_bytes", "most_bytes"), [("auto", 307e6, 50e6), ("fp32", 614e6, 250e6)]
)
def test_a_model_is_not_held_in_memory(
    tiny_model: Path, tmp_path: Path, dtype: str, file_bytes: float, most_bytes: float
) -> None:
    """Unchanged weights need no memory; those of another dtype need that of the blocks that are
    being converted.
    """
    base = make_base("llama", tmp_path / "base", tiny_model)
    # What is imported and kept at the first time is no part of the model.
    write(base, tmp_path / "warm", dtype=ExportDtype.bf16)
    big = {
        f"big.{number}": torch.full((1024, 10_000), number, dtype=torch.bfloat16)
        for number in range(15)
    }
    save_file(
        {**load_file(base / "model.safetensors"), **big},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    del big
    before = _anonymous_bytes()
    most, ended = [before], threading.Event()

    def watch() -> None:
        while not ended.wait(0.002):
            most[0] = max(most[0], _anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        folder = write(base, tmp_path / "out", dtype=ExportDtype(dtype))
    finally:
        ended.set()
        watcher.join()
    assert (folder / "model.pt").stat().st_size > file_bytes
    assert most[0] - before < most_bytes
