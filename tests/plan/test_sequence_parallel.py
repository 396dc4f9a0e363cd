"""What ranks can share of rows: the arithmetic of batches, refusals, and what a plan says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.config.compose import compose_config
from llmtune.config.groups.train import TrainConfig
from llmtune.config.schema import Config
from llmtune.errors import ConfigError
from llmtune.plan.advice import describe_misfit
from llmtune.plan.batch_sizes import Ranks, batch_options
from llmtune.plan.ladder import Candidate, Ladder
from llmtune.plan.length.sequence_parallel import check_sequence_parallel
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.memory.rank_bytes import LayerBytes
from llmtune.plan.memory.recomputed_layers import RecomputedLayers
from llmtune.plan.memory.trace.exchange_bytes import exchange_bytes
from llmtune.plan.resolve import resolve_ladder, resolve_plan
from llmtune.plan.speed import Cluster

CARDS = ["hardware=8xa100_80gb", "precision=bf16", "data.train=none.jsonl"]
LONG = ["model=llama31_70b", "tuner=lora", "data.max_seq_length=131072", *CARDS]


def compose(*overrides: str) -> Config:
    return compose_config(list(overrides)).config


def chosen(*overrides: str) -> Candidate:
    ladder: Ladder = resolve_ladder(compose(*overrides), planning=True)
    assert ladder.chosen is not None
    return ladder.chosen


@given(
    groups=st.integers(1, 6),
    count=st.integers(1, 6),
    micro=st.integers(1, 4),
    accumulated=st.integers(1, 4),
)
def test_rows_divide_among_groups(groups: int, count: int, micro: int, accumulated: int) -> None:
    rows = groups * micro * accumulated
    train = TrainConfig(global_batch_size=rows, per_device_train_batch_size=micro)
    (batch,) = batch_options(train, Ranks(groups * count, count), 1000, "cuda")
    assert (batch.accumulation_steps, batch.groups) == (accumulated, groups)
    # All ranks together compute all tokens, and at most one more each.
    of_all = batch.rank_tokens(1000) * count
    assert micro * 1000 <= of_all < micro * 1000 + count
    assert batch.resized(2 * rows).accumulation_steps == 2 * accumulated


def test_messages_name_groups() -> None:
    with pytest.raises(ConfigError, match=r"=6 does not divide among 4 groups of 2 ranks: take 4"):
        batch_options(TrainConfig(global_batch_size=6), Ranks(8, 2), 1000, "cuda")


@pytest.mark.parametrize(
    ("overrides", "world", "expected"),
    [
        (["launch.sequence_parallel_size=3"], 8, "8 ranks do not divide into groups of 3"),
        (["launch.sequence_parallel_size=16"], 16, "take one of [1, 2, 4, 8]"),
        (
            ["launch.sequence_parallel_size=2", "model.attn_implementation=sdpa"],
            8,
            "model.attn_implementation=sdpa does not",
        ),
        (
            ["launch.sequence_parallel_size=2", "train.neftune_noise_alpha=5"],
            8,
            "train.neftune_noise_alpha",
        ),
        (["launch.sequence_parallel_size=2", "train.compile=layers"], 8, "train.compile=none"),
    ],
)
def test_what_cannot_be_shared_is_refused(overrides: list[str], world: int, expected: str) -> None:
    config = compose("model=tiny", "data.train=none.jsonl", *overrides)
    shape = replace(resolve_shape(config.model, config.tuner), heads=8)
    kernel = config.model.attn_implementation.replace("auto", "varlen")
    with pytest.raises(ConfigError) as error:
        check_sequence_parallel(config, shape, kernel, world)
    assert expected in str(error.value)
    # The same without the key is taken.
    config.launch.sequence_parallel_size = 1
    check_sequence_parallel(config, shape, kernel, world)


def test_positions_that_depend_on_the_length_of_a_row_are_refused() -> None:
    config = compose("model=tiny", "data.train=none.jsonl", "launch.sequence_parallel_size=2")
    shape = resolve_shape(config.model, config.tuner)
    check_sequence_parallel(config, shape, "varlen", 2)
    with pytest.raises(ConfigError, match="rotary positions"):
        check_sequence_parallel(config, replace(shape, dynamic_positions=True), "varlen", 2)


def test_a_classifier_and_more_ranks_than_there_are_are_refused_before_a_rank_starts() -> None:
    with pytest.raises(ConfigError, match=r"model\.task="):
        resolve_plan(
            compose(
                *("model=tiny_bert", "model.task=sequence_classification", "data.train=none.jsonl"),
                "data.max_seq_length=128",
                *("launch.sequence_parallel_size=2", "launch.nproc=2"),
            )
        )
    with pytest.raises(ConfigError, match="1 rank does not divide into groups of 2"):
        resolve_plan(compose("model=tiny", "launch.sequence_parallel_size=2", "launch.nproc=1"))


def test_128k_tokens_of_70b_fit_on_8_cards_that_share_them() -> None:
    config = compose(*LONG)
    ladder = resolve_ladder(config, planning=True)
    assert ladder.chosen is None
    assert "Try: launch.sequence_parallel_size=" in describe_misfit(config, ladder)
    alone = ladder.rungs[0].candidate
    assert alone is not None
    assert chosen(*LONG, "launch.sequence_parallel_size=8").placement.rung == "none"
    # An eighth of the tokens is saved by each, with as many layers recomputed.
    every = "train.gradient_checkpointing=true"
    shared = chosen(*LONG, "launch.sequence_parallel_size=8", every)
    assert alone.recomputed.count == alone.recomputed.total
    device = shared.memory.device
    assert device.activations < 1.01 * alone.memory.device.activations / 8
    # Weights and states are those of all ranks, as before.
    assert device.weights == alone.memory.device.weights
    assert device.optimizer == alone.memory.device.optimizer


def test_sharing_costs_time_where_rows_would_fit() -> None:
    job = ["model=llama31_8b", "tuner=lora", "data.max_seq_length=4096", *CARDS]
    alone, shared = chosen(*job), chosen(*job, "launch.sequence_parallel_size=8")
    assert shared.speed.terms["tokens for heads"] > 0
    assert alone.speed.terms["tokens for heads"] == 0
    assert shared.speed.tokens_per_second < alone.speed.tokens_per_second


def test_memory_that_ran_out_in_a_group_says_nothing_of_other_sizes_of_groups() -> None:
    job = ["model=llama31_8b", "tuner=lora", "data.max_seq_length=4096", *CARDS]
    keys = [chosen(*job, f"launch.sequence_parallel_size={count}").key for count in (1, 2, 4)]
    assert "sequence_parallel_size" not in keys[0], "as earlier versions wrote it"
    assert [key["sequence_parallel_size"] for key in keys[1:]] == [2, 4]


def test_a_group_on_two_nodes_is_as_slow_as_the_network() -> None:
    hardware = resolve_ladder(compose(*LONG), planning=True).hardware
    inside = Cluster(replace(hardware, nodes=2), 16).exchange_seconds(1e9, 8)
    # Three ranks on a node: one of the groups of two has ranks on both.
    across = Cluster(replace(hardware, nodes=2), 6).exchange_seconds(1e9, 2)
    assert across / (1 / 2) > 4 * inside / (7 / 8), "of what leaves a rank"


def test_repeated_keys_are_kept() -> None:
    config = compose("model=tiny", "data.train=none.jsonl")
    shape = replace(resolve_shape(config.model, config.tuner), heads=8, key_heads=2)
    none, every = RecomputedLayers(0, 2), RecomputedLayers(2, 2)
    two, four = (exchange_bytes(shape, 100, count, 2, none) for count in (2, 4))
    width = shape.attention_width // 8
    assert four.saved - two.saved == 2 * 2 * (2 * 2 * 100 * width)
    assert exchange_bytes(shape, 100, 4, 2, every).saved == 0
    assert exchange_bytes(shape, 100, 1, 2, none) == LayerBytes(saved=0, working=0)


def test_overlap_is_off_in_groups() -> None:
    job = ["model=llama31_8b", "tuner=full", "zero=2", "optim=adamw_8bit", *CARDS]
    alone = resolve_ladder(compose(*job), planning=True).rungs[0].candidate
    shared = resolve_ladder(compose(*job, "launch.sequence_parallel_size=2"), planning=True).rungs[
        0
    ]
    assert alone is not None
    assert alone.sizes.overlaps
    assert shared.candidate is not None
    assert not shared.candidate.sizes.overlaps
