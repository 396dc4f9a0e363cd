"""The dictionary for DeepSpeed: derived sizes, keys that it really reads, raw keys over them."""

from __future__ import annotations

import json
import os
import sys

import pytest

from llmtune.config.compose import compose_config
from llmtune.errors import ConfigError
from llmtune.optimizer.optimizer import OPTIMIZERS
from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.deepspeed_config import to_deepspeed
from llmtune.plan.deepspeed_overrides import KNOWN, OWNED, check_raw, merge_raw, resize
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.memory.parameter_groups import parameter_groups, sub_groups
from llmtune.plan.memory.placement import Placement
from llmtune.plan.memory.rank_bytes import Arithmetic
from llmtune.plan.memory.shapes import TensorShape
from llmtune.plan.memory.zero_buffers import resolve_zero_sizes
from llmtune.plan.memory.zero_states import state_bytes
from llmtune.plan.resolve import plan_candidate, resolve_ladder
from tests.support import ROOT, run

ADAMW = OPTIMIZERS.find("adamw")


def test_the_buffers_of_70b_on_8_ranks_hold_its_largest_slice() -> None:
    config = compose_config(["model=llama3_70b", "tuner=full"]).config
    shape = resolve_shape(config.model, config.tuner)
    sizes = resolve_zero_sizes(shape, Placement(3, "nvme", "nvme"), ADAMW, 8, "cuda")
    assert sizes.param_buffer >= 131_334_144
    groups = sub_groups(
        parameter_groups(list(shape.tensors), Placement(3, "nvme"), 8), 8, sizes.sub_group
    )
    assert sum(tensor.numel for group in groups for tensor in group) == shape.parameters
    assert all(
        not tensor.vector
        for group in groups
        for tensor in group
        if len(group) > 1 and not group[0].vector
    )


def test_adapters_stay_on_every_rank() -> None:
    config = compose_config(["model=llama3_70b"]).config
    shape = resolve_shape(config.model, config.tuner)
    sizes = resolve_zero_sizes(shape, Placement(3), ADAMW, 8, "cuda")
    assert sizes.persistence_threshold >= 28_672 * 16


def test_matrices_off_the_sectors_have_a_group_of_their_own_on_nvme() -> None:
    tensors = [
        TensorShape(name="even", shape=(1024, 1024), trained=True),
        TensorShape(name="odd", shape=(1001, 1001), trained=True),
        TensorShape(name="odd too", shape=(999, 1001), trained=True),
        TensorShape(name="norm", shape=(1001,), trained=True),
    ]
    grouped = parameter_groups(tensors, Placement(3, "nvme"), 2)
    assert [[tensor.name for tensor in group] for group in grouped] == [
        ["even"],
        ["odd"],
        ["odd too"],
        ["norm"],
    ]
    assert len(parameter_groups(tensors, Placement(3), 2)) == 2


def test_nothing_is_left_to_auto_and_nvme_has_its_aio_section() -> None:
    config = compose_config(
        [
            "model=llama3_70b",
            "tuner=full",
            "hardware=8xa100_80gb",
            "hardware.nvme_bytes=4TB",
            "offload=nvme",
            "data.train=a",
        ]
    ).config
    ladder = resolve_ladder(config, planning=True)
    assert ladder.chosen is not None
    deepspeed = plan_candidate(config, ladder, ladder.chosen).deepspeed
    assert "auto" not in json.dumps(deepspeed)
    assert set(deepspeed["aio"]) == KNOWN["aio"]
    assert deepspeed["zero_optimization"]["offload_param"]["buffer_size"] >= 131_334_144


def test_raw_keys_are_merged_and_planned_with() -> None:
    raw = {
        "zero_optimization": {"reduce_bucket_size": 12345, "offload_param": {"buffer_count": 9}},
        "aio": {"queue_depth": 64},
    }
    config = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1}, "gradient_clipping": 1.0}
    merged = merge_raw(config, raw)
    assert merged["zero_optimization"]["reduce_bucket_size"] == 12345
    assert merged["zero_optimization"]["stage"] == 3
    assert "offload_param" not in merged["zero_optimization"], "this placement has none"
    shape = resolve_shape(
        compose_config(["model=tiny"]).config.model, compose_config(["model=tiny"]).config.tuner
    )
    sizes = resize(resolve_zero_sizes(shape, Placement(3), ADAMW, 1, "cpu"), raw)
    assert (sizes.reduce_bucket, sizes.aio.queue_depth, sizes.param_buffers) == (12345, 64, 9)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("zero.deepspeed={zero_optimisation:{stage:3}}", "did you mean 'zero_optimization'"),
        (
            "zero.deepspeed={aio:{thread_count:4}}",
            "zero.deepspeed.aio.thread_count: DeepSpeed would ignore",
        ),
        ("zero.deepspeed={zero_optimization:{stage:2}}", "set zero=0, 1, 2 or 3"),
        ("zero.deepspeed={gradient_clipping:0.3}", "set train.max_grad_norm"),
        ("zero.deepspeed={elasticity:{enabled:false}}", "zero.deepspeed.elasticity"),
        ("zero.deepspeed={aio:7}", "a section of keys"),
        (
            "zero.deepspeed={zero_optimization:{zero_quantized_weights:true}}",
            "quantizer, which needs the CUDA toolkit",
        ),
        (
            "zero.deepspeed={zero_optimization:{zero_quantized_gradients:true}}",
            "quantizer, which needs the CUDA toolkit",
        ),
    ],
)
def test_raw_keys_that_deepspeed_ignores_are_errors(override: str, part: str) -> None:
    config = compose_config(["model=tiny", override]).config
    with pytest.raises(ConfigError, match=part):
        resolve_ladder(config)


def test_a_raw_key_for_kernels_that_is_off_needs_none() -> None:
    check_raw(
        {"zero_optimization": {"zero_quantized_weights": False, "zero_hpz_partition_size": 2}}
    )


@pytest.mark.process
def test_the_known_keys_are_deepspeeds_own() -> None:
    """In a process of its own: importing DeepSpeed takes the accelerator from the environment."""
    script = """
import json
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import DeepSpeedThroughputTimerConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
def keys(model):
    return sorted({field.alias or name for name, field in model.model_fields.items()})
print(json.dumps({
    "zero_optimization": keys(DeepSpeedZeroConfig),
    "zero_optimization.offload_optimizer": keys(DeepSpeedZeroOffloadOptimizerConfig),
    "zero_optimization.offload_param": keys(DeepSpeedZeroOffloadParamConfig),
    "aio": sorted(AIO_DEFAULT_DICT),
    "timers.throughput": keys(DeepSpeedThroughputTimerConfig),
}))
"""  # noqa: E501
    done = run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu"}
    )
    theirs = json.loads(done.out.splitlines()[-1])
    for section, known in theirs.items():
        assert KNOWN[section] <= set(known), KNOWN[section] - set(known)
    assert not KNOWN[""] & set(OWNED)


@pytest.mark.parametrize(
    ("tuner", "placement", "ranks", "accelerator", "overlaps"),
    [
        ("full", Placement(2), 8, "cuda", True),
        ("full", Placement(3), 8, "cuda", True),
        ("full", Placement(1), 8, "cuda", False),
        ("full", Placement(2), 1, "cuda", False),
        ("full", Placement(2), 8, "cpu", False),
        ("full", Placement(2, "cpu"), 8, "cuda", False),
        ("lora", Placement(2), 8, "cuda", False),
    ],
)
def test_reductions_overlap_where_that_is_right_and_has_an_effect(
    tuner: str, placement: Placement, ranks: int, accelerator: str, overlaps: bool
) -> None:
    config = compose_config(["model=smollm2_360m", f"tuner={tuner}"]).config
    shape = resolve_shape(config.model, config.tuner)
    sizes = resolve_zero_sizes(shape, placement, ADAMW, ranks, accelerator)
    assert sizes.overlaps == overlaps
    largest = max(tensor.numel for tensor in shape.tensors if tensor.trained)
    if placement.zero_stage < 3:
        assert sizes.reduce_bucket >= largest
        parts = 4 if overlaps else 1
        assert sizes.reduce_bucket == max(largest, shape.trainable_parameters // parts)
    deepspeed = to_deepspeed(
        placement,
        BatchPlan(global_batch_size=8, micro_batch_size=1, accumulation_steps=1, world_size=ranks),
        sizes,
        {},
        config.precision,
        1.0,
    )
    assert deepspeed["zero_optimization"]["overlap_comm"] == overlaps

    # Two buckets and a flat copy are counted, in bf16.
    states = state_bytes(shape, placement, sizes, Arithmetic(config.precision, ADAMW), ranks)
    if placement.zero_stage < 3:
        buckets = 3 if overlaps else 1
        assert states.backward == 2 * (buckets * sizes.reduce_bucket + largest)


def test_a_bucket_that_the_largest_gradient_does_not_fit_is_not_overlapped() -> None:
    config = compose_config(["model=smollm2_360m", "tuner=full"]).config
    shape = resolve_shape(config.model, config.tuner)
    sizes = resolve_zero_sizes(shape, Placement(2), ADAMW, 8, "cuda")

    def overlaps(**keys: object) -> bool:
        return resize(sizes, {"zero_optimization": keys}).overlaps

    assert overlaps()
    assert overlaps(reduce_bucket_size=sizes.largest_gradient)
    assert not overlaps(reduce_bucket_size=sizes.largest_gradient - 1)
    assert not overlaps(overlap_comm=False)
    assert overlaps(reduce_bucket_size=1000, overlap_comm=True)
    of_stage_3 = resolve_zero_sizes(shape, Placement(3), ADAMW, 8, "cuda")
    assert resize(of_stage_3, {"zero_optimization": {"reduce_bucket_size": 1000}}).overlaps


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_the_second_partition_of_hpz_is_counted_where_the_weights_are(tuner: str) -> None:
    """On two ranks an engine of this model has 106,816 bytes of it for frozen weights."""
    config = compose_config(["model=tiny", f"tuner={tuner}"]).config
    shape = resolve_shape(config.model, config.tuner)
    raw = {"zero_optimization": {"zero_hpz_partition_size": 2}}
    for param in ("none", "cpu"):
        placement = Placement(3, "cpu", param)
        plain = resolve_zero_sizes(shape, placement, ADAMW, 2, "cuda")
        arithmetic = Arithmetic(config.precision, ADAMW)
        without, with_it = (
            state_bytes(shape, placement, sizes, arithmetic, 2)
            for sizes in (plain, resize(plain, raw))
        )
        more = with_it.weights.device - without.weights.device
        more_on_host = with_it.weights.host - without.weights.host
        assert (more, more_on_host) == ((106_816, 0) if param == "none" else (0, 106_816))
        assert with_it.adapters == without.adapters
