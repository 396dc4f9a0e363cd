"""The part of a model that ``tuner=freeze`` trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from llmtune.cli.main import main
from llmtune.config.groups.tuner import FreezeConfig, TunerConfig
from llmtune.errors import ConfigError
from llmtune.plan.architecture.meta_model import build_meta_model
from llmtune.task.task import find_task
from llmtune.tuner.blocks import count_frozen_layers
from llmtune.tuner.tuner import TUNERS, find_trained
from tests.extend.test_export_format import JOB
from tests.support import first, run_cli

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 48},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4},
    "opt": {"hidden_size": 32, "num_hidden_layers": 4, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bert": {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 48},
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4},
    "mixtral": {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 48},
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def build(kind: str, task: str, **more: Any) -> Any:
    heads = {} if kind == "gpt2" else HEADS
    architecture = AutoConfig.for_model(kind, vocab_size=128, **heads, **SIZES[kind], **more)
    return build_meta_model(architecture, model_class=find_task(task).model_class)[0]


def config_of(**chosen: Any) -> TunerConfig:
    return TunerConfig(kind="freeze", freeze=FreezeConfig(**chosen))


def trained_of(model: Any, config: TunerConfig, task: str = "causal_lm") -> set[str]:
    head = [] if task == "causal_lm" else find_task(task).head_modules(model)
    return find_trained(TUNERS.find("freeze"), model, config, head)


TEXT = "sequence_classification"


@pytest.mark.parametrize(
    ("kind", "task", "layers", "others"),
    [
        ("llama", "causal_lm", "model.layers", ["model.norm"]),
        ("llama", TEXT, "model.layers", ["model.norm", "score"]),
        ("gpt2", "causal_lm", "transformer.h", ["transformer.ln_f"]),
        ("gpt2", TEXT, "transformer.h", ["transformer.ln_f", "score"]),
        # Its final norm is defined before the layers.
        ("opt", "causal_lm", "model.decoder.layers", ["model.decoder.final_layer_norm"]),
        # A norm of its embeddings is defined beside the layers too.
        ("bloom", "causal_lm", "transformer.h", ["transformer.ln_f"]),
        ("mixtral", "causal_lm", "model.layers", ["model.norm"]),
        ("bert", TEXT, "bert.encoder.layer", ["bert.pooler", "classifier"]),
        ("bert", "token_classification", "bert.encoder.layer", ["classifier"]),
    ],
)
@pytest.mark.parametrize("count", [1, 3, 4])
def test_the_last_layers_are_trained_with_what_follows_them(
    kind: str, task: str, layers: str, others: list[str], count: int
) -> None:
    model = build(kind, task)
    chosen = [f"{layers}.{index}" for index in range(4 - count, 4)] + others
    trained = trained_of(model, config_of(last_layers=count), task)
    every = [name for name, _ in model.named_parameters()]
    assert trained == {
        name for name in every if any(name.startswith(f"{module}.") for module in chosen)
    }
    assert all(any(name.startswith(f"{module}.") for name in trained) for module in chosen)
    head = [] if task == "causal_lm" else find_task(task).head_modules(model)
    assert count_frozen_layers(model, trained, head) == 4 - count


@pytest.mark.parametrize(
    ("pattern", "names", "frozen_layers"),
    [
        (r"layers\.2\.mlp\.up_proj", {"model.layers.2.mlp.up_proj.weight"}, 2),
        ("^model.norm", {"model.norm.weight"}, 4),
        # A tied head has the name of the embeddings, before which nothing is frozen.
        ("lm_head", {"model.embed_tokens.weight"}, 0),
        (
            r"3\..*q_proj|embed",
            {"model.layers.3.self_attn.q_proj.weight"} | {"model.embed_tokens.weight"},
            0,
        ),
    ],
)
def test_a_pattern_is_searched_for_in_every_name_of_a_parameter(
    pattern: str, names: set[str], frozen_layers: int
) -> None:
    model = build("llama", "causal_lm", tie_word_embeddings=True)
    trained = trained_of(model, config_of(pattern=pattern))
    assert trained == names
    assert count_frozen_layers(model, trained) == frozen_layers


def test_a_head_of_its_own_is_trained_alone_where_it_is_named() -> None:
    model = build("llama", "causal_lm", tie_word_embeddings=False)
    trained = trained_of(model, config_of(pattern="lm_head"))
    assert trained == {"lm_head.weight"}
    assert count_frozen_layers(model, trained) == 4


def test_what_the_model_does_not_have_is_refused_with_what_it_has() -> None:
    model = build("llama", "causal_lm")
    with pytest.raises(
        ConfigError, match=r"the model has 4, from model\.layers\.0 to model\.layer"
    ):
        trained_of(model, config_of(last_layers=5))
    with pytest.raises(ConfigError) as caught:
        trained_of(model, config_of(pattern="layer_7"))
    assert str(caught.value).startswith("tuner.freeze.pattern=layer_7 matches no parameter")
    assert str(caught.value).count("q_proj") == 1, "a name stands once for all layers"
    assert "model.layers.N.self_attn.q_proj.weight" in str(caught.value)
    assert "lm_head.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["tuner=freeze", "tuner.freeze.last_layers=3"], "tuner.freeze.last_layers=3: the model h"),
        (["tuner=freeze", "tuner.freeze.last_layers=0"], "tuner.freeze.last_layers=0: must be abo"),
        (["tuner=freeze", "tuner.freeze.last_layers=null"], "tuner=freeze needs tuner.freeze.last"),
        (["tuner=freeze", "tuner.freeze.pattern=mlp"], "add tuner.freeze.last_layers=null"),
        (["tuner=freeze", "tuner.freeze.last_layers=null", "tuner.freeze.pattern=q_prj"], "q_prj"),
        (
            ["tuner=freeze", "tuner.freeze.last_layers=null", "tuner.freeze.pattern=mlp("],
            "tuner.freeze.pattern=mlp(: it is not a regular expression",
        ),
        (["tuner=lora", "tuner.freeze.last_layers=1"], "tuner.freeze.last_layers=1 needs tuner=fr"),
        (["tuner=full", "tuner.freeze.pattern=mlp"], "tuner.freeze.pattern=mlp needs tuner=freeze"),
        (["tuner=freeze", "export=adapter"], "export=adapter: partial fine-tuning has no adapter"),
        (["tuner=freeze", "tuner.adapter_path=/x"], "tuner.adapter_path=/x needs tuner=lora"),
    ],
)
def test_a_choice_that_cannot_be_trained_is_refused_before_anything_begins(
    overrides: list[str], text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*JOB, *overrides, f"output_dir={tmp_path}/run"]) == 2
    assert text in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.process
@pytest.mark.parametrize("place", first(1, [("3", "cpu"), ("0", "none"), ("2", "optimizer_cpu")]))
def test_a_run_that_stopped_resumes_to_the_last_digit(
    place: tuple[str, str], tmp_path: Path
) -> None:
    """Also with checkpointing, whose first layer is frozen, and bf16, which has master weights."""
    stage, rung = place
    job = [
        *JOB,
        *("tuner=freeze", "tuner.freeze.last_layers=1", f"zero={stage}", f"offload={rung}"),
        *("launch.nproc=2", "train.global_batch_size=4", "train.gradient_checkpointing=true"),
        *("schedule=constant", "optim.learning_rate=1e-3", "export=none"),
    ]
    for name, steps in (("whole", [4]), ("stopped", [2, 4])):
        for last in steps:
            done = run_cli(*job, f"train.max_steps={last}", f"output_dir={tmp_path / name}")
            assert done.code == 0, done.err
    whole, stopped = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "stopped")
    )
    losses, resumed = (
        {line["step"]: line["loss"] for line in lines if "loss" in line}
        for lines in (whole, stopped)
    )
    assert losses == resumed
    assert len(set(losses.values())) == 4
