"""Merging: peft's bits where peft is right, the unmerged model's logits everywhere, and refusal
where anything does not match.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmtune.config.groups.export import ExportConfig, ExportDtype
from llmtune.errors import ConfigError, ExportError
from llmtune.export.merge.deltas import LowRank
from llmtune.export.pipeline import run_export
from llmtune.export.request import ExportRequest
from llmtune.storage.tensors.row_blocks import BLOCK_ELEMENTS, row_ranges
from tests.export.conftest import TOKENS, make_adapter, make_base

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

#: Name -> base, peft settings, whether peft's own merge is to be met bit for bit. Where input and
#: output embeddings are one matrix and the adapter treats them differently, peft merges into both,
#: and its merged model is not the unmerged one.
KINDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "LoRA": ("llama", {}, True),
    "rsLoRA": ("llama", {"use_rslora": True}, True),
    "DoRA": ("llama", {"use_dora": True}, True),
    "patterns": (
        "llama",
        {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {r"layers.1.*up_proj": 32}},
        True,
    ),
    "patterns with rsLoRA": ("llama", {"use_rslora": True, "rank_pattern": {"down_proj": 2}}, True),
    "output layer": ("llama", {"target_modules": ["q_proj", "lm_head"]}, True),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, True),
    "embedding, DoRA": (
        "llama",
        {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
        True,
    ),
    "both embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}, True),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head", "norm"]}, True),
    "saved embedding": ("llama", {"modules_to_save": ["embed_tokens"]}, True),
    "token rows": ("llama", {"trainable_token_indices": [2, 9, 511]}, True),
    "token rows of both": (
        "llama",
        {"trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [7]}},
        True,
    ),
    "bias of B": ("llama-bias", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}, True),
    "all biases": ("llama-bias", {"bias": "all"}, True),
    "biases of adapted layers": (
        "llama-bias",
        {"bias": "lora_only", "target_modules": ["q_proj"]},
        True,
    ),
    "resized vocabulary": ("llama", {"resize_to": 525}, True),
    "resized and adapted": (
        "llama",
        {"resize_to": 525, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        True,
    ),
    "tied": ("llama-tied", {}, True),
    "tied, token rows": ("llama-tied", {"trainable_token_indices": [2, 9, 511]}, True),
    "tied, embedding": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}, False),
    "tied, output": ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}, False),
    "tied, both kept tied": (
        "llama-tied",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        False,
    ),
    "tied, saved embedding": ("llama-tied", {"modules_to_save": ["embed_tokens"]}, False),
    "tied, saved output": ("llama-tied", {"modules_to_save": ["lm_head"]}, False),
    "tied, saved both": (
        "llama-tied",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        False,
    ),
    "tied but stored twice": ("llama-twice", {}, True),
    "tied but stored twice, embedding": (
        "llama-twice",
        {"target_modules": ["embed_tokens", "q_proj"]},
        False,
    ),
    "tied but stored twice, token rows": (
        "llama-twice",
        {"trainable_token_indices": [2, 9, 511]},
        True,
    ),
    "tied, resized": ("llama-tied", {"resize_to": 525}, True),
    "fan_in_fan_out": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        True,
    ),
    "fan_in_fan_out, DoRA": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
        True,
    ),
    "fan_in_fan_out, all biases": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
        True,
    ),
}


def export(base: Path, adapter: Path | None, output: Path, **settings: Any) -> Path:
    request = ExportRequest(base=base, base_name="tiny", adapter=adapter, run=None, output=output)
    return run_export(request, ExportConfig(**settings))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def load_peft_adapter(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Base and adapter in peft, unmerged."""
    model = load(base, dtype)
    rows = [
        shape[0]
        for name, shape in shapes(adapter).items()
        if "embed_tokens" in name and name.endswith("r.weight")
    ]
    rows += [
        shape[0] for name, shape in shapes(adapter).items() if name.endswith("embed_tokens.weight")
    ]
    if rows and rows[0] != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows[0])
    return PeftModel.from_pretrained(model, adapter).eval()


def shapes(adapter: Path) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(tensor.shape)
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_merged_model_is_the_unmerged_one_and_peft_merges_to_the_same_bits(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    name, settings, as_peft = KINDS[kind]
    base = make_base(name, tmp_path / "base", tiny_model)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    reference = load_peft_adapter(base, adapter)
    merged = load(export(base, adapter, tmp_path / "out"))
    with torch.no_grad():
        expected, found, plain = (
            reference(TOKENS).logits,
            merged(TOKENS).logits,
            load(base)(TOKENS).logits,
        )
    assert torch.allclose(found, expected, atol=2e-5), (found - expected).abs().max()
    assert not torch.allclose(found[..., :512], plain, atol=1e-4), "the adapter does something"
    if as_peft:
        bits = reference.merge_and_unload().state_dict()
        for parameter, tensor in merged.state_dict().items():
            assert torch.equal(tensor, bits[parameter]), parameter


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "both embeddings", "fan_in_fan_out", "bias of B"])
def test_in_bf16_there_is_one_rounding_as_in_peft(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    name, settings, _ = KINDS[kind]
    base = make_base(name, tmp_path / "base", tiny_model, torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", torch.bfloat16, **settings)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert {tensor.dtype for key, tensor in stored.items() if "lora_" in key} == {torch.float32}
    merged = load_file(export(base, adapter, tmp_path / "out") / "model.safetensors")
    bits = load_peft_adapter(base, adapter, torch.bfloat16).merge_and_unload().state_dict()
    for parameter, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        if "embed_tokens" in parameter and kind == "both embeddings":
            # For embeddings peft rounds the product before it adds it, and then the sum.
            stem = "base_model.model.model.embed_tokens.lora_embedding_"
            exact = (
                load_file(base / "model.safetensors")[parameter].float()
                + (stored[f"{stem}B"] @ stored[f"{stem}A"]).T * 3
            )
            assert torch.equal(tensor, exact.bfloat16())
        else:
            assert torch.equal(tensor, bits[parameter]), parameter


def test_rows_of_a_block_have_the_bits_of_the_whole(
    tiny_model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    base = make_base("llama", tmp_path / "base", tiny_model, torch.bfloat16)
    adapter = make_adapter(
        base, tmp_path / "adapter", target_modules=[*LINEARS, "embed_tokens", "lm_head"]
    )
    whole = load_file(export(base, adapter, tmp_path / "whole") / "model.safetensors")
    assert BLOCK_ELEMENTS > 512 * 48
    monkeypatch.setattr("llmtune.storage.tensors.row_blocks.BLOCK_ELEMENTS", 48 * 16)
    pieces = load_file(export(base, adapter, tmp_path / "pieces") / "model.safetensors")
    assert all(torch.equal(pieces[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(
    "shape", [(2048, 5632), (5632, 2048), (2053, 1022), (130, 9000), (33, 70_000)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_of_real_sizes_have_the_bits_of_the_whole(
    shape: tuple[int, int], transposed: bool
) -> None:
    """A product of few rows is summed in another order; at 186 rows a block, 2048 rows would leave
    two for the last.
    """
    draw = torch.Generator().manual_seed(0)
    stored = shape[::-1] if transposed else shape
    tensors = {
        "a": torch.randn(64, stored[1], generator=draw) * 0.02,
        "b": torch.randn(stored[0], 64, generator=draw) * 0.02,
    }
    base = torch.randn(shape, generator=draw).bfloat16()
    whole = tensors["b"] @ tensors["a"]
    step = LowRank(a="a", b="b", scale=2.0, transposed=transposed).bind(tensors.__getitem__)
    ranges = list(row_ranges(shape))
    assert len(ranges) > 1
    found = torch.cat([step(base[first:last], first) for first, last in ranges])
    assert torch.equal(found, (whole.T if transposed else whole) * 2.0 + base)


def test_a_dtype_is_rounded_to_once(tiny_model: Path, tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base", tiny_model, torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter")
    fine = load_file(
        export(base, adapter, tmp_path / "fp32", dtype=ExportDtype.fp32) / "model.safetensors"
    )
    half = load_file(
        export(base, adapter, tmp_path / "fp16", dtype=ExportDtype.fp16) / "model.safetensors"
    )
    auto = load_file(export(base, adapter, tmp_path / "auto") / "model.safetensors")
    assert {tensor.dtype for tensor in fine.values()} == {torch.float32}
    for name, tensor in fine.items():
        assert torch.equal(half[name], tensor.half())
        assert torch.equal(auto[name], tensor.bfloat16())
    assert json.loads((tmp_path / "fp16" / "config.json").read_text())["dtype"] == "float16"


def test_shards_have_an_index_and_load(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    folder = export(base, adapter, tmp_path / "out", max_shard_bytes=100_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    one, many = load(export(base, adapter, tmp_path / "one")), load(folder)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))
    again = export(folder, adapter, tmp_path / "again")
    assert (again / "model.safetensors").is_file(), "a sharded base is as good as one file"


def test_a_second_export_replaces_the_first_and_nothing_else(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
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


def test_a_merged_model_stops_where_answers_were_trained_to_end(base: Path, tmp_path: Path) -> None:
    (base / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 0, "temperature": 0.6})
    )
    adapter = make_adapter(base, tmp_path / "adapter")
    settings = json.loads(
        (export(base, adapter, tmp_path / "out") / "generation_config.json").read_text()
    )
    assert settings["eos_token_id"] == [0, 2]


def edit(adapter: Path, **tensors: torch.Tensor | None) -> None:
    file = adapter / "adapter_model.safetensors"
    found: dict[str, Any] = {**load_file(file), **tensors}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, file)


STEM = "base_model.model.model.layers."


@pytest.mark.parametrize(
    ("tensors", "part"),
    [
        ({f"{STEM}9.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}, "no LoRA pair"),
        (
            {f"{STEM}0.mlp.up_proj.lora_B.weight": None},
            "0.mlp.up_proj.lora_A.weight is no LoRA pair",
        ),
        ({"something.else": torch.ones(1)}, "1 tensors that no adapter has: something.else"),
        (
            {
                f"{STEM}9.mlp.up_proj.lora_{side}.weight": torch.ones(shape)
                for side, shape in (("A", (4, 64)), ("B", (128, 4)))
            },
            "layers.9.mlp.up_proj.weight is not in the base",
        ),
        ({f"{STEM}0.mlp.up_proj.lora_A.weight": torch.ones(4, 65)}, "the adapter is for"),
        ({f"{STEM}0.mlp.up_proj.lora_A.weight": torch.full((4, 64), torch.nan)}, "holds NaN"),
        (
            {
                f"{STEM}0.mlp.up_proj.lora_{side}.weight": torch.ones(shape)
                for side, shape in (("A", (5, 64)), ("B", (128, 5)))
            },
            "has rank 5, adapter_config.json says 4",
        ),
        (
            {"base_model.model.lm_head.base_layer.bias": torch.ones(8)},
            "lm_head.bias is not in the base",
        ),
        (
            {"base_model.model.model.norm.weight": torch.ones(64)},
            "neither in modules_to_save nor an embedding",
        ),
        (
            {"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(320, 64)},
            "not equal to the base's",
        ),
    ],
)
def test_what_matches_nothing_is_an_error_and_publishes_nothing(
    base: Path, tmp_path: Path, tensors: dict[str, torch.Tensor | None], part: str
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    edit(adapter, **tensors)
    with pytest.raises(ExportError, match=part) as caught:
        export(base, adapter, tmp_path / "out")
    assert caught.value.exit_code == 6
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"use_dora": True}, "use_dora=True in adapter_config.json, which its tensors contradict"),
        ({"peft_type": "LOHA"}, "peft_type LOHA is not supported"),
        ({"alora_invocation_tokens": [1]}, "merging with alora_invocation_tokens is not supported"),
        (
            {"something_of_next_year": {"a": 1}},
            "merging with something_of_next_year is not supported",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base before training"),
        (
            {"trainable_token_indices": [1]},
            "trainable_token_indices, and no tensor holds trained rows",
        ),
        ({"modules_to_save": ["lm_head"]}, "lm_head among modules_to_save, and no tensor of it"),
    ],
)
def test_an_adapter_that_means_something_else_is_refused(
    base: Path, tmp_path: Path, settings: dict[str, Any], part: str
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(ExportError, match=part):
        export(base, adapter, tmp_path / "out")


def test_an_adapter_that_was_never_trained_or_is_cut_off_is_refused(
    base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(
        {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in tensors.items()}, file
    )
    with pytest.raises(ExportError, match="every lora_B is zero"):
        export(base, adapter, tmp_path / "out")
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ExportError, match="cut off or damaged"):
        export(base, adapter, tmp_path / "out")
    file.unlink()
    with pytest.raises(ExportError, match=r"no adapter_model\.safetensors"):
        export(base, adapter, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_base_with_a_shard_missing_or_cut_off_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    load(base).save_pretrained(tmp_path / "many", max_shard_size="100KB")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(ExportError, match=f"names {shards[1].name}, which is missing"):
        export(tmp_path / "many", adapter, tmp_path / "out")
    shards[1].write_bytes(whole[:-10])
    with pytest.raises(ExportError, match=f"{shards[1].name} is cut off"):
        export(tmp_path / "many", adapter, tmp_path / "out")
    save_file({"other": torch.ones(2)}, shards[1])
    with pytest.raises(ExportError, match="names tensors that no file holds"):
        export(tmp_path / "many", adapter, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_adapter_of_another_base_is_refused(
    base: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = make_base("llama", tmp_path / "other", tiny_model)
    adapter = make_adapter(other, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ExportError, match="does not belong to this base"):
        export(base, adapter, tmp_path / "out")
    # The same shapes, other numbers: peft stores the embedding below an adapted one.
    twin = load(other)
    twin.model.embed_tokens.weight.data[7, 7] += 1
    twin.save_pretrained(tmp_path / "twin")
    with pytest.raises(ExportError, match="not equal to the base's"):
        export(tmp_path / "twin", adapter, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_base_of_another_name_is_noted(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    base.rename(tmp_path / "Twin-1B")
    for name, noted in (("Twin-1B", True), (f"me/{base.name}", False)):
        said: list[str] = []
        run_export(
            ExportRequest(
                base=tmp_path / "Twin-1B",
                base_name=name,
                adapter=adapter,
                run=None,
                output=tmp_path / "out",
                say=said.append,
            ),
            ExportConfig(),
        )
        note = f"note: the adapter names {base} as its base, and is merged into {name}"
        assert (note in said) == noted, said


def test_formats_without_sense_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    with pytest.raises(ExportError, match="has no adapter"):
        export(base, None, tmp_path / "out", format="adapter")
    with pytest.raises(ConfigError, match="export=none writes nothing"):
        export(base, adapter, tmp_path / "out", format="none")
    for kind, why in (("gguf", "export.gguf_type says"), ("adapter", "copied as it is")):
        with pytest.raises(
            ExportError, match=f"export.dtype=fp16 has no part in export={kind}: .*{why}"
        ):
            export(base, adapter, tmp_path / "out", format=kind, dtype=ExportDtype.fp16)
    assert not (tmp_path / "out").exists()
    assert (
        export(base, adapter, tmp_path / "a", format="adapter") / "adapter_model.safetensors"
    ).is_file()


def test_a_full_model_is_exported_as_it_is(base: Path, tmp_path: Path) -> None:
    (base / "zero_to_fp32.py").write_text("# DeepSpeed's, of a checkpoint\n")
    folder = export(base, None, tmp_path / "out")
    assert not (folder / "zero_to_fp32.py").exists()
    assert all(
        torch.equal(a, b)
        for a, b in zip(load(folder).parameters(), load(base).parameters(), strict=True)
    )
    assert "Load it" in (folder / "README.md").read_text()
    said: list[str] = []
    request = ExportRequest(
        base=base,
        base_name="tiny",
        adapter=None,
        run=None,
        output=tmp_path / "rounded",
        say=said.append,
    )
    rounded = run_export(request, ExportConfig(dtype=ExportDtype.bf16))
    assert any("of the weights before they were rounded" in line for line in said), said
    assert "of the weights before they were rounded" in (rounded / "README.md").read_text()


def test_buffers_and_whole_numbers_are_kept(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    save_file(
        {**load_file(base / "model.safetensors"), "position_ids": torch.arange(5)},
        base / "model.safetensors",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(
            load_file(export(base, adapter, tmp_path / "out") / "model.safetensors")[
                "position_ids"
            ],
            torch.arange(5),
        )
