"""Layers that torch compiles one by one compute what they computed before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from llmtune.config.groups.train import Compile, TrainConfig
from llmtune.errors import ConfigError
from llmtune.model.compiled_layers import Compiled, find_layers
from llmtune.plan.abilities import check_compile, compiles_layers
from tests.support import largest_difference, losses, run_cli

SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97}


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "bert", "roberta"])
def test_layers_are_those_of_the_architecture(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(kind, **SIZE))
    layers = find_layers(model)
    assert len(layers) == 3
    assert all(type(layer).__name__.endswith("Layer") for layer in layers)
    assert find_layers(nn.Linear(2, 2)) == []


@pytest.mark.parametrize(
    ("stage", "in_4_bits", "message"),
    [(3, False, "ZeRO 3 gathers .* take zero=2"), (2, True, "weights in 4 bits")],
)
def test_what_the_compiler_cannot_see_is_refused(stage: int, in_4_bits: bool, message: str) -> None:
    asked, not_asked = TrainConfig(compile=Compile.layers), TrainConfig()
    with pytest.raises(ConfigError, match=message):
        check_compile(asked, stage, in_4_bits)
    check_compile(asked, 2, in_4_bits=False)
    check_compile(not_asked, stage, in_4_bits)
    assert [compiles_layers(asked, one) for one in range(4)] == [True, True, True, False]
    assert not compiles_layers(not_asked, 0)


def test_breaks_are_told_with_the_first_reason() -> None:
    assert Compiled(1, {}).describe(4) == "compiled: 4 layers run as 1 graphs, without a break"
    told = Compiled(5, {"a loop\n more": 3, "b": 1}).describe(4)
    assert told == "compiled: 4 layers run as 5 graphs, with 4 breaks (first: a loop)"


CLASSES = ["data=stdlib_modules", "data.max_seq_length=32", "data.max_overlong_share=1"]
JOBS = {
    "llama, lora, 2 ranks": ["model=tiny", "tuner=lora", "zero=2", "launch.nproc=2"],
    "llama, recomputed, packed": [
        *("model=tiny", "tuner=full", "zero=0", "launch.nproc=1", "data.packing=true"),
        "train.gradient_checkpointing=true",
    ],
    "qwen3, full": [
        *("model=tiny", "model.config.model_type=qwen3", "tuner=full", "zero=1"),
        "launch.nproc=1",
    ],
    "roberta": ["model=tiny_roberta", *CLASSES, "tuner=full", "zero=0", "launch.nproc=1"],
}


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_a_compiled_run_has_the_losses_of_one_that_is_not(job: list[str], tmp_path: Path) -> None:
    common = [
        *(*job, "precision=fp32", "train.max_steps=4", "optim.learning_rate=1e-3", "export=none"),
        *("train.sample_answers=false", "train.eval_max_rows=8", "train.save_steps=null"),
    ]
    plain = run_cli(*common, f"output_dir={tmp_path}/plain")
    assert plain.code == 0, plain.err
    compiled = run_cli(
        *common, "train.compile=layers", f"output_dir={tmp_path}/compiled", timeout=600
    )
    assert compiled.code == 0, compiled.err
    assert "layers run as" in compiled.out
    assert largest_difference(losses(tmp_path / "plain"), losses(tmp_path / "compiled")) < 1e-5
