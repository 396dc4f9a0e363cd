"""The plan's numbers, against published ones."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llmtune.config.byte_sizes import parse_bytes
from llmtune.config.compose import compose_config
from llmtune.config.groups.schedule import ScheduleConfig
from llmtune.config.groups.train import TrainConfig
from llmtune.config.schema import Precision
from llmtune.errors import ConfigError, DoesNotFitError, MissingPrerequisiteError
from llmtune.optimizer.optimizer import OPTIMIZERS
from llmtune.plan.length.resolve_steps import resolve_steps
from llmtune.plan.memory import model_shape as shapes
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.memory.placement import Placement
from llmtune.plan.memory.rank_bytes import Arithmetic
from llmtune.plan.memory.zero_buffers import resolve_zero_sizes
from llmtune.plan.memory.zero_states import state_bytes
from llmtune.plan.plan import Plan
from llmtune.plan.resolve import resolve_ladder, resolve_plan
from llmtune.storage.plain_fields import from_plain
from llmtune.tuner.tuner import TUNERS
from llmtune.units import counted, format_bytes, format_count, format_seconds


def test_the_70b_shape_is_exact() -> None:
    config = compose_config(["model=llama3_70b"]).config
    shape = resolve_shape(config.model, config.tuner)
    assert shape.parameters == 70_553_706_496
    assert shape.trainable_parameters == 207_093_760
    assert shape.largest_tensor == 128_256 * 8192
    assert shape.layer_parameters == 855_654_400 + 161_792 * 16


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("llama3_8b", 8_030_261_248), ("llama2_7b", 6_738_415_616), ("smollm2_135m", 134_515_008)],
)
def test_the_shipped_models_have_their_published_sizes(model: str, parameters: int) -> None:
    config = compose_config([f"model={model}", "tuner=full"]).config
    shape = resolve_shape(config.model, config.tuner)
    assert shape.parameters == shape.trainable_parameters == parameters


def test_states_under_zero_3_are_what_the_formula_says() -> None:
    config = compose_config(["model=llama3_70b", "tuner=full"]).config
    shape = resolve_shape(config.model, config.tuner)
    sizes = resolve_zero_sizes(shape, Placement(3), OPTIMIZERS.find("adamw"), 8, "cuda")
    states = state_bytes(
        shape, Placement(3), sizes, Arithmetic(Precision.bf16, OPTIMIZERS.find("adamw")), 8
    )
    standing = states.weights.device + states.gradients.device + states.optimizer.device
    assert standing / 2**30 == pytest.approx(131.4, abs=0.1)
    assert states.weights.device == pytest.approx(17.64e9, rel=1e-3)


def test_a_job_that_cannot_run_here_can_be_planned() -> None:
    ladder = resolve_ladder(
        compose_config(["model=llama3_70b", "hardware=8xh100", "tuner=qlora", "zero=3"]).config,
        planning=True,
    )
    assert ladder.chosen is not None
    assert ladder.chosen.memory.device.weights < 8e9
    assert ladder.refusals == ()
    bert = [
        "model.name_or_path=x",
        "model.config.model_type=t5",
        "data.train=a.jsonl",
        "tuner=full",
    ]
    assert resolve_ladder(compose_config(bert).config, planning=True).shape.parameters > 10**7
    with pytest.raises(ConfigError, match="no model for language modeling"):
        resolve_ladder(compose_config(bert).config)


def test_70b_on_this_machine_is_refused_with_what_is_missing() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        resolve_plan(compose_config(["+model=llama3_70b", "+zero=3"]).config)
    text = str(caught.value)
    assert caught.value.exit_code == 3
    for part in ("70.6 B parameters", "needs", "has ", "optimizer_nvme", "Try: "):
        assert part in text


def test_named_gpus_that_are_not_there_are_a_missing_prerequisite() -> None:
    with pytest.raises(MissingPrerequisiteError, match="torch sees no CUDA device"):
        resolve_plan(compose_config(["experiment=llama3_70b_lora_8xa100"]).config)


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "rank", "0 ranks"),
        (1, "NVIDIA GPU", "1 NVIDIA GPU"),
        (1200, "row", "1,200 rows"),
        (0.5, "epoch", "0.5 epochs"),
        (1.0, "epoch", "1 epoch"),
        (3.0, "epoch", "3 epochs"),
    ],
)
def test_numbers_are_told_from_one(count: float, noun: str, text: str) -> None:
    assert counted(count, noun) == text


def test_a_plan_survives_json() -> None:
    plan = resolve_plan(compose_config(["model=tiny", "zero=3", "launch.nproc=2"]).config)
    back = from_plain(Plan, json.loads(json.dumps(plan.to_dict())))
    assert back == replace(plan, shape=replace(plan.shape, tensors=()))
    assert "auto" not in json.dumps(plan.deepspeed)


def test_zero_3_sizes_follow_the_adapter_and_the_layer() -> None:
    plan = resolve_plan(compose_config(["zero=3"]).config)
    zero = plan.deepspeed["zero_optimization"]
    assert zero["stage3_param_persistence_threshold"] >= 1536 * 16
    assert zero["stage3_max_live_parameters"] > 2 * plan.shape.layer_parameters


def test_auto_takes_the_lowest_stage_that_fits() -> None:
    config = compose_config(
        ["tuner=lora", "launch.nproc=2", "hardware.host_memory_bytes=64GB"]
    ).config
    assert resolve_plan(config).placement.zero_stage == 0
    config = compose_config(
        ["tuner=full", "launch.nproc=2", "hardware.host_memory_bytes=6GB"]
    ).config
    assert resolve_plan(config).placement.zero_stage > 0


@pytest.mark.parametrize(
    ("tuner", "model", "rate"),
    [("lora", "smollm2_135m", 1e-3), ("lora", "llama3_8b", 2e-4), ("full", "smollm2_135m", 5e-5)],
)
def test_the_learning_rate_follows_tuner_and_size(tuner: str, model: str, rate: float) -> None:
    config = compose_config(
        [f"tuner={tuner}", f"model={model}", "hardware.host_memory_bytes=1TB"]
    ).config
    plan = resolve_plan(config)
    assert plan.learning_rate == rate
    assert any("learning rate" in note for note in plan.notes)


def test_steps_come_from_epochs_or_max_steps() -> None:
    schedule = ScheduleConfig(warmup_ratio=0.1)
    assert resolve_steps(TrainConfig(), schedule, 100, 8).total_steps == 13
    assert resolve_steps(TrainConfig(num_train_epochs=2), schedule, 100, 8).total_steps == 25
    broken = resolve_steps(TrainConfig(num_train_epochs=1.05), schedule, 8, 8)
    assert (broken.total_steps, broken.total_rows) == (1, 8), "no step without rows"
    steps = resolve_steps(TrainConfig(max_steps=50), schedule, 100, 8)
    assert (steps.total_steps, steps.warmup_steps) == (50, 5)
    assert resolve_steps(TrainConfig(max_steps=1), schedule, 100, 8).warmup_steps == 0
    with pytest.raises(ConfigError, match="leaves nothing"):
        resolve_steps(TrainConfig(), ScheduleConfig(warmup_steps=99), 80, 8)


def test_bytes_are_read_and_written_as_people_do() -> None:
    assert parse_bytes("80GiB", "k") == 80 * 2**30
    assert parse_bytes("1.5TB", "k") == 1_500_000_000_000
    assert parse_bytes(17, "k") == 17
    with pytest.raises(ConfigError, match=r"hardware.x=lots"):
        parse_bytes("lots", "hardware.x")
    assert (format_bytes(141.1e9), format_count(70.55e9), format_seconds(3723)) == (
        "141.1 GB",
        "70.5 B",
        "1:02:03",
    )


def test_an_unknown_architecture_and_module_are_named() -> None:
    with pytest.raises(ConfigError, match="model_type=lama"):
        resolve_plan(compose_config(["model=tiny", "model.config.model_type=lama"]).config)
    with pytest.raises(ConfigError, match=r"llama has no such setting; did you mean hidden_size\?"):
        resolve_plan(compose_config(["model=tiny", "model.config.hiden_size=64"]).config)
    for modules in ("[qproj]", "[q_proj,typo]", "[q_proj,embed_tokens]"):
        with pytest.raises(ConfigError, match="matches no linear layer; the model has"):
            resolve_plan(compose_config(["model=tiny", f"tuner.target_modules={modules}"]).config)
    plan = resolve_plan(
        compose_config(["model=tiny", "tuner.target_modules=[self_attn.q_proj]"]).config
    )
    assert plan.shape.trainable_parameters == 2 * 16 * (64 + 64)


def test_a_remembered_shape_is_the_counted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [
        compose_config(["model=tiny", f"tuner={tuner}"]).config
        for tuner in ("full", "lora", "qlora")
    ]
    counted = [shapes.resolve_shape(config.model, config.tuner, tmp_path) for config in configs]
    assert len(list((tmp_path / "shapes").iterdir())) == 3
    with monkeypatch.context() as patch:
        patch.setattr(shapes, "_count", lambda *_: pytest.fail("counted again"))
        assert [
            shapes.resolve_shape(config.model, config.tuner, tmp_path) for config in configs
        ] == counted
    wider = compose_config(["model=tiny", "model.config.hidden_size=128"]).config
    assert shapes.resolve_shape(wider.model, wider.tuner, tmp_path).hidden_size == 128


def test_another_model_in_the_same_folder_is_counted_anew(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = compose_config([f"model.name_or_path={folder}"]).config
    first = shapes.resolve_shape(config.model, config.tuner, tmp_path / "cache")
    numbers = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**numbers, "num_hidden_layers": 5}))
    second = shapes.resolve_shape(config.model, config.tuner, tmp_path / "cache")
    assert (first.layers, second.layers) == (2, 5)
    assert second.parameters > first.parameters


@pytest.mark.parametrize(
    ("overrides", "reasons"),
    [
        (["model=tiny"], []),
        (
            ["model=tiny", "data.max_seq_length=9999"],
            [r"data.max_seq_length=9999: .* has \d+ positions"],
        ),
        (
            [
                *("model=tiny", "tuner=qlora", "data.max_seq_length=9999"),
                "zero.deepspeed={zero_optimization:"
                " {stage3_use_all_reduce_for_fetch_params: true}}",
            ],
            ["adds numbers, and tuner=qlora gathers bytes", "data.max_seq_length=9999"],
        ),
        (
            ["model=llama3_8b", "hardware=8xa100_80gb", "hardware.nodes=2", "zero=3"],
            ["starts the ranks of one machine"],
        ),
        (
            ["model.name_or_path=x", "model.config.model_type=t5", "data.train=a.jsonl"],
            ["no model for language modeling"],
        ),
    ],
)
def test_a_plan_says_why_its_job_would_be_refused(overrides: list[str], reasons: list[str]) -> None:
    config = compose_config(overrides, planning=True).config
    found = resolve_ladder(config, planning=True).refusals
    assert len(found) == len(reasons)
    for reason, text in zip(reasons, found, strict=True):
        assert re.search(reason, text)
    if reasons:
        with pytest.raises((ConfigError, MissingPrerequisiteError)):
            resolve_ladder(config)


def test_a_tuner_that_trains_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TUNERS.find("full"), "trains", lambda name, parameter: False)
    # In a cache of its own: the shape with a tuner that trains something is remembered.
    config = compose_config(["model=tiny", "tuner=full", f"paths.cache_dir={tmp_path}"]).config
    with pytest.raises(ConfigError, match="tuner.kind=full trains no parameter of random"):
        resolve_plan(config)
