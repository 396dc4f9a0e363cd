"""Plans of models with a head for rows or tokens: counts, activations, speed, experiments."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from llmtune.config.compose import compose_config
from llmtune.config.groups.model import ModelConfig
from llmtune.config.groups.tuner import TunerConfig
from llmtune.config.schema import Precision
from llmtune.plan.architecture.load import load_architecture
from llmtune.plan.architecture.meta_model import set_outputs
from llmtune.plan.ladder import Ladder
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.memory.shapes import ModelShape
from llmtune.plan.memory.trace.activations import ActivationModel
from llmtune.plan.memory.trace.fake_run import TraceSettings, gpu_dropout
from llmtune.plan.resolve import resolve_ladder
from llmtune.plan.speed import forward_flops, step_flops
from llmtune.task.task import find_task
from llmtune.tuner.head import Head
from llmtune.tuner.peft_model import add_lora
from tests.support import matrix

#: Parameters with a head for two classes, as transformers counts those of the published models.
PUBLISHED = {
    "roberta_large": 355_361_794,
    "roberta_base": 124_647_170,
    "bert_base_uncased": 109_483_778,
    "bert_base_chinese": 102_269_186,
    "chinese_roberta_wwm_ext_large": 325_524_482,
    "xlm_roberta_base": 278_045_186,
    "modernbert_base": 149_606_402,
    "deberta_v3_large": 435_063_810,
    "minilm_l6": 22_713_986,
}

NUMBERS = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "vocab_size": 200,
}
OF_KIND: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"max_position_embeddings": 130, "pad_token_id": 1},
    "xlm-roberta": {"max_position_embeddings": 130, "pad_token_id": 1, "type_vocab_size": 1},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": "p2c|c2p",
        "position_buckets": 32,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "max_position_embeddings": 128,
    },
    "modernbert": {
        "local_attention": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "electra": {"embedding_size": 32},
    "llama": {"num_key_value_heads": 2, "pad_token_id": 0},
}
TASKS = ["sequence_classification", "token_classification", "regression"]


def small(kind: str, task: str, **changes: Any) -> ModelConfig:
    config = {"model_type": kind, **NUMBERS, **OF_KIND[kind], **changes}
    return ModelConfig(name_or_path="x", config=config, task=task)


def shape_of(model: str, *overrides: str) -> ModelShape:
    overrides = ("model.task=sequence_classification", "data.train=rows.jsonl", *overrides)
    config = compose_config([f"model={model}", *overrides]).config
    return resolve_shape(config.model, config.tuner)


def build(config: ModelConfig, kernel: str = "eager") -> Any:
    import transformers

    task, architecture = find_task(config.task), load_architecture(config)
    set_outputs(architecture, task.default_labels.names)
    return getattr(transformers, task.model_class).from_config(
        architecture, dtype=torch.float32, attn_implementation=kernel
    )


def head_of(config: ModelConfig, model: Any) -> Head:
    task = find_task(config.task)
    return Head(modules=tuple(task.head_modules(model)), peft_type=task.peft_type)


def kept_bytes(config: ModelConfig, tuner: TunerConfig, settings: TraceSettings) -> int:
    """Bytes of the storages that a real forward pass saves for its backward pass, parameters left
    out.
    """
    model = build(config, settings.attn_implementation)
    if tuner.kind == "lora":
        model = add_lora(model, tuner, "base", 0, head_of(config, model)).get_base_model()
    model.train()
    own = {item.untyped_storage().data_ptr() for item in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            saved[address] = tensor
        return tensor

    ids = torch.randint(5, 100, (settings.rows, settings.length))
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0
    on_gpu = settings.accelerator == "cuda"
    with (
        gpu_dropout() if on_gpu else contextlib.nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = model(ids, attention_mask=mask if settings.bidirectional else None)
    assert output is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize(
    "cells",
    matrix(
        [*OF_KIND],
        TASKS[:2],
        ["full", "lora"],
        ["sdpa", "eager"],
        ["cuda", "cpu"],
        size=8,
        once=True,
    ),
)
def test_kept_activations_of_a_model_with_a_head_are_within_five_percent(cells: list[Any]) -> None:
    for kind, task, tuner_kind, kernel, accelerator in cells:
        config, tuner = small(kind, task), TunerConfig(kind=tuner_kind)
        shape = resolve_shape(config, tuner)
        settings = TraceSettings(
            rows=3,
            length=96,
            gradient_checkpointing=False,
            attn_implementation=kernel if kernel in shape.kernels else "eager",
            precision=Precision.fp32,
            zero3=False,
            masked=shape.bidirectional,
            bidirectional=shape.bidirectional,
            accelerator=accelerator,
        )
        found = ActivationModel(config, tuner, shape)(settings)
        assert found.origin == "traced", kind
        kept = kept_bytes(config, tuner, settings)
        assert found.saved == pytest.approx(kept, rel=0.05), (kind, task, tuner_kind, settings)


def test_dropout_keeps_a_byte_an_element_on_a_gpu_and_the_products_of_sdpa_on_a_cpu() -> None:
    def saved(accelerator: str, **changes: Any) -> int:
        config, tuner = (
            small("bert", "sequence_classification", **changes),
            TunerConfig(kind="lora"),
        )
        shape = resolve_shape(config, tuner)
        settings = TraceSettings(
            rows=1,
            length=128,
            gradient_checkpointing=False,
            attn_implementation="sdpa",
            precision=Precision.bf16,
            zero3=False,
            masked=True,
            bidirectional=True,
            accelerator=accelerator,
        )
        return ActivationModel(config, tuner, shape)(settings).saved

    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    only_hidden = {"attention_probs_dropout_prob": 0.0}
    assert saved("cuda", **none) == saved("cpu", **none)
    # Two per layer and that of the embeddings.
    elements = (2 * 5 + 1) * 128 * 64
    dropped = saved("cuda", **only_hidden) - saved("cuda", **none)
    assert dropped == pytest.approx(elements, rel=0.15)
    assert saved("cuda") == saved("cuda", **only_hidden)
    assert saved("cpu") > saved("cpu", **only_hidden) + 5 * 4 * 128 * 128 * 2


@pytest.mark.parametrize("kind", [kind for kind in OF_KIND if kind != "electra"])
def test_recomputed_layers_keep_their_inputs(kind: str) -> None:
    config, tuner = small(kind, "sequence_classification"), TunerConfig(kind="full")
    shape = resolve_shape(config, tuner)
    settings = TraceSettings(
        rows=4,
        length=96,
        gradient_checkpointing=True,
        attn_implementation=shape.kernels[-1] if kind == "deberta-v2" else "sdpa",
        precision=Precision.bf16,
        zero3=False,
        masked=shape.bidirectional,
        bidirectional=shape.bidirectional,
    )
    found = ActivationModel(config, tuner, shape)(settings)
    assert found.origin == "traced"
    inputs = 5 * 4 * 96 * 64 * 2
    assert inputs < found.saved < 3 * inputs
    assert found.working > inputs / 5


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_shipped_encoders_have_their_published_sizes(model: str) -> None:
    shape = shape_of(model, "tuner=full")
    assert shape.parameters == shape.trainable_parameters == PUBLISHED[model]
    assert shape.trainable
    assert shape.bidirectional
    assert (shape.outputs, shape.judges_rows) == (2, True)
    assert shape.max_positions == (8192 if model == "modernbert_base" else 512)


@pytest.mark.parametrize("kind", OF_KIND)
@pytest.mark.parametrize("task", TASKS)
def test_adapters_leave_the_head_out_which_is_trained(kind: str, task: str) -> None:
    config, tuner = small(kind, task), TunerConfig(kind="lora")
    shape = resolve_shape(config, tuner)
    model = build(config)
    head = head_of(config, model)
    wrapped = add_lora(model, tuner, "base", 0, head)
    trained = {name: p.numel() for name, p in wrapped.named_parameters() if p.requires_grad}
    of_head = {name for name in trained if ".lora_" not in name}
    assert of_head == {
        f"base_model.model.{name}"
        for name, _ in wrapped.get_base_model().named_parameters()
        if name.split(".")[0] in head.modules
    }
    assert shape.trainable_parameters == sum(trained.values())
    assert shape.head_parameters == sum(trained[name] for name in of_head)
    assert shape.trainable_parameters == shape.adapter_parameters + shape.head_parameters
    assert [t.name for t in shape.tensors if t.trained and not t.adapter] == [
        name.removeprefix("base_model.model.") for name in trained if name in of_head
    ]
    stored = wrapped.peft_config["default"]
    assert (stored.task_type, stored.modules_to_save) == (head.peft_type, list(head.modules))


def test_a_named_target_that_the_head_has_too_is_adapted_in_the_layers_alone() -> None:
    config = small("roberta", "sequence_classification")
    tuner = TunerConfig(kind="lora", target_modules=["query", "dense"])
    wrapped = add_lora(model := build(config), tuner, "base", 0, head_of(config, model))
    adapted = [name for name, _ in wrapped.named_parameters() if "lora_A" in name]
    assert len(adapted) == resolve_shape(config, tuner).layers * 4
    assert not [name for name in adapted if "classifier" in name]


def test_outputs_are_those_that_the_configuration_names() -> None:
    def outputs(task: str, **changes: Any) -> int:
        return resolve_shape(small("bert", task, **changes), TunerConfig(kind="lora")).outputs

    assert [outputs(task) for task in TASKS] == [2, 3, 1]
    assert outputs("sequence_classification", num_labels=8) == 8
    assert outputs("regression", id2label={0: "a", 1: "b", 2: "c"}) == 3
    assert resolve_shape(small("llama", "auto"), TunerConfig(kind="lora")).outputs == 200


def test_every_token_of_an_encoder_meets_the_whole_row() -> None:
    bert = resolve_shape(small("bert", "sequence_classification"), TunerConfig(kind="full"))
    llama = resolve_shape(small("llama", "sequence_classification"), TunerConfig(kind="full"))
    deberta = resolve_shape(
        small("deberta-v2", "sequence_classification"), TunerConfig(kind="lora")
    )

    def attention(shape: ModelShape) -> float:
        return forward_flops(shape, 100) - 2.0 * shape.matrix_parameters

    # Two products, of two operations each.
    assert attention(bert) == 4 * 100 * 64 * 5
    assert attention(llama) == attention(bert) / 2
    assert attention(deberta) == 2 * attention(bert)
    # The head sees rows, so that nothing of it is taken from what is recomputed.
    assert step_flops(bert, 100, True) - step_flops(bert, 100, False) == forward_flops(bert, 100)
    words = resolve_shape(small("bert", "auto"), TunerConfig(kind="full"))
    # The one has a pooler, the other a matrix of the same size before its vocabulary.
    assert words.matrix_parameters == bert.matrix_parameters + words.vocab_size * 64


def test_what_has_no_class_for_a_task_is_planned_and_refused() -> None:
    job = ["data.train=a.jsonl", "model.name_or_path=x", "model.config.model_type=mamba"]
    composed = compose_config([*job, "tuner=full", "model.task=token_classification"])
    ladder = resolve_ladder(composed.config, planning=True)
    assert ladder.shape.parameters > 0
    (reason,) = ladder.refusals
    assert "AutoModelForTokenClassification does not build mamba" in reason


def planned(experiment: str, hardware: str | None = None) -> Ladder:
    overrides = [f"experiment={experiment}", *([f"hardware={hardware}"] if hardware else [])]
    return resolve_ladder(compose_config(overrides, planning=True).config, planning=True)


@pytest.mark.parametrize(
    ("experiment", "hardware", "rows"),
    [
        ("roberta_large_classification", "1xrtx4090", 32),
        ("roberta_large_classification", "4xa100_80gb", 128),
        ("bert_base_chinese_4xa100", None, 128),
        ("llama3_8b_classifier_lora", "1xrtx4090", 16),
    ],
)
def test_an_experiment_fits_its_hardware(experiment: str, hardware: str | None, rows: int) -> None:
    ladder = planned(experiment, hardware)
    assert ladder.chosen is not None
    assert ladder.refusals == ()
    assert ladder.activations_origin == "traced"
    assert ladder.rows.global_batch_size == rows
    assert ladder.shape.judges_rows
    assert ladder.chosen.memory.device.logits < 1e6


def test_roberta_large_at_8_x_512_in_fp16_fits_24_gb_without_recomputation() -> None:
    """States are 16 bytes a parameter and fp32 gradients; a layer keeps 34 bytes an element of its
    output (https://arxiv.org/abs/2205.05198), less the products of attention.
    """
    ladder = planned("roberta_large_classification", "1xrtx4090")
    assert ladder.chosen is not None
    device = ladder.chosen.memory.device
    states = device.weights + device.gradients + device.optimizer
    assert states == pytest.approx(16 * 355_361_794, rel=0.01)
    assert device.activations == pytest.approx(24 * 34 * 8 * 512 * 1024, rel=0.1)
    assert ladder.chosen.recomputed.count == 0
    assert ladder.chosen.batch.micro_batch_size == 8
