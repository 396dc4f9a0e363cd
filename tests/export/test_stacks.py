"""Adapters on stacked experts merge to peft's weights, however files store the experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune.config.groups.export import ExportConfig
from llmtune.errors import ExportError
from llmtune.export.pipeline import run_export
from llmtune.export.request import ExportRequest
from tests.architectures.families import FAMILIES
from tests.export.conftest import copy_tokenizer, make_adapter

#: Family -> the parameters of its experts, and what ``target_modules`` adapts beside them.
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"target_parameters": STACKS},
    "qwen3_moe": {"target_parameters": STACKS[1:], "target_modules": [], "use_rslora": True},
    "gpt_oss": {"target_parameters": STACKS, "rank_pattern": {r".*\.gate_up_proj": 2}},
    "llama4_text": {"target_parameters": STACKS},
    "jetmoe": {"target_parameters": ["mlp.output_linear.weight", "experts.input_linear.weight"]},
}


def make_mixture(family: str, folder: Path, tokenizer: Path) -> Path:
    given = {"model_type": family, **FAMILIES[family], "vocab_size": 512}
    torch.manual_seed(0)
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    copy_tokenizer(tokenizer, folder)
    return folder


def merge(base: Path, adapter: Path, output: Path) -> str:
    said: list[str] = []
    request = ExportRequest(
        base=base, base_name="tiny", adapter=adapter, run=None, output=output, say=said.append
    )
    run_export(request, ExportConfig())
    return " ".join(said)


@pytest.mark.parametrize("family", list(KINDS))
def test_stacks_merge_to_pefts_weights(family: str, tmp_path: Path, tiny_model: Path) -> None:
    base = make_mixture(family, tmp_path / "base", tiny_model)
    settings = {"target_modules": ["q_proj"], **KINDS[family]}
    if family == "jetmoe":
        settings["target_modules"] = ["kv_proj"]
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    text = merge(base, adapter, tmp_path / "merged")
    assert "parity" in text
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    unmerged = {name: value.clone() for name, value in model.state_dict().items()}
    peft_model: Any = PeftModel.from_pretrained(model, str(adapter))
    expected = peft_model.merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    changed = set()
    for name, value in found.state_dict().items():
        # One unit in the last place of a sum, whose parts may be larger than it.
        size = torch.maximum(expected[name].abs(), unmerged[name].abs())
        assert bool(((value - expected[name]).abs() <= 2**-23 * size).all()), name
        if not torch.equal(value, unmerged[name]):
            changed.add(name)
    assert sum(value.ndim == 3 for value in map(unmerged.get, changed)) >= 2, changed  # type: ignore[union-attr]


def test_an_adapter_of_other_experts_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    base = make_mixture("mixtral", tmp_path / "base", tiny_model)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=[], target_parameters=STACKS)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "base_layer.lora_A" in name)
    save_file({**tensors, name: tensors[name][:-1].clone()}, file)
    with pytest.raises(ExportError, match="experts"):
        merge(base, adapter, tmp_path / "merged")
    save_file({key: tensors[key] for key in tensors if "base_layer" not in key}, file)
    with pytest.raises(ExportError, match=r"no tensor of model\.layers\.0\.mlp\.experts\.base_lay"):
        merge(base, adapter, tmp_path / "merged")
