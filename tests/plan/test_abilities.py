"""Kernels, positions and stages that an architecture lacks are refused; what it has is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from llmtune.config.compose import compose_config
from llmtune.config.groups.model import Kernels
from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.plan.abilities import (
    attention_kernels,
    check_kernels,
    check_row_length,
    check_stage,
    describe_kernels,
    max_positions,
    resolve_attention,
    resolve_kernels,
)
from llmtune.plan.architecture.meta_model import build_meta_model
from llmtune.plan.resolve import resolve_ladder

SIZE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
GATED = {**SIZE, "intermediate_size": 48, "num_key_value_heads": 2}
GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4}


def positions(family: str, **numbers: Any) -> int | None:
    config = AutoConfig.for_model(family, **numbers)
    return max_positions(build_meta_model(config)[0], config)


@pytest.mark.parametrize(
    ("family", "numbers", "expected"),
    [
        ("gpt2", {**GPT, "n_positions": 1024}, 1024),
        ("gpt2", {**GPT, "n_positions": 1}, 1),
        (
            "opt",
            {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 2048},
            2048,
        ),
        (
            "mpt",
            {"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 64},
            64,
        ),
        (
            "roberta",
            {**SIZE, "intermediate_size": 48, "max_position_embeddings": 514, "is_decoder": True},
            512,
        ),
        ("llama", {**GATED, "max_position_embeddings": 4096}, 4096),
        ("bloom", {**SIZE}, None),
        ("falcon", {**SIZE, "alibi": True, "max_position_embeddings": 2048}, None),
        ("falcon", {**SIZE, "alibi": False, "max_position_embeddings": 2048}, 2048),
        (
            "mamba",
            {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
            None,
        ),
    ],
)
def test_the_longest_row_is_that_of_the_positions(
    family: str, numbers: dict[str, Any], expected: int | None
) -> None:
    assert positions(family, **numbers) == expected


@pytest.mark.process
def test_a_recurrent_model_has_no_longest_row() -> None:
    """In a process: transformers asks for the compiler of its kernel."""
    assert (
        positions("rwkv", vocab_size=97, hidden_size=32, num_hidden_layers=1, context_length=64)
        is None
    )


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 4096),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 16384),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 8192),
        (
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 4096,
                "rope_theta": 1e4,
            },
            16384,
        ),
        (
            {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 2048,
                "rope_theta": 1e4,
            },
            4096,
        ),
    ],
)
def test_scaled_rotary_positions_reach_further(rope: dict[str, Any], expected: int) -> None:
    assert (
        positions("llama", **GATED, max_position_embeddings=4096, rope_parameters=rope) == expected
    )


def test_llama_3s_number_of_positions_stands_behind_its_scaling() -> None:
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 5e5,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    assert (
        positions("llama", **GATED, max_position_embeddings=131072, rope_parameters=rope) == 131072
    )


def test_rows_beyond_the_positions_are_refused_with_the_length_that_is_not() -> None:
    check_row_length(1024, 1024, "m")
    check_row_length(10**9, None, "m")
    with pytest.raises(
        ConfigError,
        match=r"data.max_seq_length=1025: m has 1024 positions.*data.max_seq_length=1024 or less",
    ):
        check_row_length(1025, 1024, "m")


def test_a_run_is_refused_and_a_plan_is_not(cache: Path) -> None:
    config = compose_config(["model=tiny", "data.max_seq_length=8193"]).config
    with pytest.raises(ConfigError, match="8192 positions"):
        resolve_ladder(config)
    assert resolve_ladder(config, planning=True).rungs


@pytest.mark.parametrize(
    ("family", "numbers", "kernels"),
    [
        ("llama", GATED, ("eager", "sdpa", "flash_attention_2", "flex_attention")),
        ("bloom", SIZE, ("eager",)),
        ("mpt", {"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 1}, ("eager",)),
    ],
)
def test_kernels_are_those_that_transformers_has(
    family: str, numbers: dict[str, Any], kernels: tuple[str, ...]
) -> None:
    assert (
        attention_kernels(build_meta_model(AutoConfig.for_model(family, **numbers))[0]) == kernels
    )


@pytest.mark.parametrize("length", [512, 513])
@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "kernels",
    [("eager",), ("eager", "sdpa"), ("eager", "flash_attention_2"), ("eager", "sdpa", "varlen")],
)
def test_auto_takes_a_kernel_that_there_is(
    length: int, accelerator: str, kernels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    config = compose_config(
        ["model=tiny", f"data.max_seq_length={length}", "data.packing=true"]
    ).config
    chosen = resolve_attention(config, accelerator, kernels)
    assert chosen in kernels
    short = accelerator == "cpu" and length == 512
    assert (chosen == "varlen") == ("varlen" in kernels)
    assert (chosen == "sdpa") == (kernels == ("eager", "sdpa") and not short)
    assert (chosen == "flash_attention_2") == (
        accelerator == "cuda" and "flash_attention_2" in kernels
    )


@pytest.mark.parametrize(
    ("precision", "capability", "takes"),
    [("bf16", 80, True), ("bf16", 0, True), ("fp16", 75, False), ("fp32", 90, False)],
)
def test_a_gpu_takes_borders_where_flash_attention_runs(
    precision: str, capability: int, takes: bool
) -> None:
    config = compose_config(["model=tiny", f"precision={precision}"]).config
    chosen = resolve_attention(config, "cuda", ("eager", "sdpa", "varlen"), capability)
    assert chosen == ("varlen" if takes else "sdpa")
    asked = ["model=tiny", f"precision={precision}", "model.attn_implementation=varlen"]
    if takes:
        config = compose_config(asked).config
        assert resolve_attention(config, "cuda", ("eager", "varlen"), capability) == "varlen"
        return
    with pytest.raises(ConfigError, match=r"varlen: its kernel on a GPU .* take .*=auto or sdpa"):
        resolve_attention(compose_config(asked).config, "cuda", ("eager", "varlen"), capability)


def test_a_kernel_that_is_asked_for_and_missing_is_refused() -> None:
    config = compose_config(["model=tiny", "model.attn_implementation=sdpa"]).config
    assert resolve_attention(config, "cpu", ("eager", "sdpa")) == "sdpa"
    with pytest.raises(
        ConfigError,
        match=r"model.attn_implementation=sdpa: .*only eager; take model.attn_implementation=auto",
    ):
        resolve_attention(config, "cpu", ("eager",))
    config = compose_config(["model=tiny", "model.attn_implementation=varlen"]).config
    assert resolve_attention(config, "cpu", ("eager", "varlen")) == "varlen"
    with pytest.raises(ConfigError, match=r"attn_implementation=varlen: documents without padding"):
        resolve_attention(config, "cpu", ("eager",))
    own = compose_config(
        ["model=tiny", "model.attn_implementation=kernels-community/flash-attn3"]
    ).config
    assert resolve_attention(own, "cpu", ("eager",)) == "kernels-community/flash-attn3"


def test_a_stage_that_an_architecture_cannot_take_is_refused() -> None:
    check_stage(3, "llama", "m")
    check_stage(2, "gemma3n_text", "m")
    with pytest.raises(ConfigError, match=r"zero=3: m \(gemma3n_text\) uses weights .*take zero=2"):
        check_stage(3, "gemma3n_text", "m")


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("accelerator", ["cuda", "cpu", "xpu"])
def test_kernels_are_those_that_run_here(
    accelerator: str, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = object() if installed else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    on_gpu = Kernels.liger if installed and accelerator == "cuda" else Kernels.torch
    on_cpu = {False: Kernels.none, True: Kernels.torch}
    for in_fp32 in (False, True):
        fastest = on_cpu[in_fp32] if accelerator == "cpu" else on_gpu
        assert resolve_kernels(Kernels.auto, accelerator, in_fp32) is fastest
    for asked in (Kernels.torch, Kernels.none, Kernels.auto):
        check_kernels(asked, accelerator)
    for asked in (Kernels.torch, Kernels.none, Kernels.liger):
        assert resolve_kernels(asked, accelerator, False) is asked
    told = describe_kernels(Kernels.auto, accelerator, True)
    assert (told == "") == (accelerator == "cpu")
    if accelerator == "cuda":
        is_there = "installed" if installed else "not installed"
        assert told == f"elementwise kernels: {on_gpu.value} (auto: liger-kernel is {is_there})"
    assert describe_kernels(Kernels.none, accelerator, False) == ""
    assert describe_kernels(Kernels.torch, accelerator, False).endswith("torch (model.kernels)")
    if accelerator == "cuda" and installed:
        check_kernels(Kernels.liger, accelerator)
        return
    error, message = (
        (ConfigError, rf"=liger: .* NVIDIA GPUs, and this run is on {accelerator}; take .*=auto")
        if accelerator != "cuda"
        else (MissingPrerequisiteError, r"not installed; pip install liger-kernel, or take")
    )
    with pytest.raises(error, match=message):
        check_kernels(Kernels.liger, accelerator)


def test_liger_is_refused_before_a_rank_starts_and_noted_in_a_plan() -> None:
    config = compose_config(
        ["model=tiny", "model.kernels=liger", "hardware.accelerator=cpu"]
    ).config
    with pytest.raises(ConfigError, match=r"model.kernels=liger: .*take model.kernels=auto"):
        resolve_ladder(config)
    assert "model.kernels=liger" in resolve_ladder(config, planning=True).refusals[0]
