"""Terms of the plan that no measurement reaches, against arithmetic written out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtune.config.compose import compose_config
from llmtune.config.schema import Precision
from llmtune.optimizer.optimizer import OPTIMIZERS, Optimizer
from llmtune.plan import speed
from llmtune.plan.devices.hardware import Hardware
from llmtune.plan.ladder import Ladder
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.memory.parameter_groups import assign_groups
from llmtune.plan.memory.peak_memory import checkpoint_bytes, gathered_bytes
from llmtune.plan.memory.placement import Placement, make_placement
from llmtune.plan.memory.rank_bytes import Arithmetic, StateBytes
from llmtune.plan.memory.shapes import ModelShape
from llmtune.plan.memory.zero_buffers import resolve_zero_sizes
from llmtune.plan.memory.zero_states import state_bytes
from llmtune.plan.param_groups import groups_of_shape
from llmtune.plan.resolve import resolve_ladder

#: Llama-3-8B: its parameters, its head (vocabulary x width), and one of its 32 layers.
PARAMETERS, HEAD, LAYER = 8_030_261_248, 128_256 * 4096, 218_112_000

ADAMW, LION, MUON = (OPTIMIZERS.find(name) for name in ("adamw", "lion", "muon"))


def shape_of(*overrides: str) -> ModelShape:
    config = compose_config(["model=llama3_8b", *overrides]).config
    return resolve_shape(config.model, config.tuner, Path(config.paths.cache_dir))


def states_of(
    shape: ModelShape,
    placement: Placement,
    precision: Precision,
    ranks: int,
    optimizer: Optimizer = ADAMW,
) -> StateBytes:
    sizes = resolve_zero_sizes(shape, placement, optimizer, ranks, "cuda")
    return state_bytes(shape, placement, sizes, Arithmetic(precision, optimizer), ranks)


@pytest.mark.parametrize(
    ("precision", "weights", "optimizer", "step"),
    [(Precision.bf16, 2, 12, 4), (Precision.fp32, 4, 8, 0)],
)
def test_without_zero_every_rank_has_all(
    precision: Precision, weights: int, optimizer: int, step: int
) -> None:
    shape = shape_of("tuner=full")
    states = states_of(shape, make_placement(0, "none", trains_all=True), precision, 4)
    assert states.weights.device == states.gradients.device == weights * PARAMETERS
    assert states.optimizer.device == optimizer * PARAMETERS
    assert states.step == step * PARAMETERS
    assert (states.total.host, states.total.nvme, states.nvme_written_per_step) == (0, 0, 0)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("precision", "size", "flattened"), [(Precision.bf16, 2, 2), (Precision.fp32, 4, 0)]
)
def test_stages_1_and_2_share_the_optimizer(
    stage: int, precision: Precision, size: int, flattened: int
) -> None:
    shape = shape_of("tuner=full")
    states = states_of(shape, make_placement(stage, "none", trains_all=True), precision, 8)
    share = PARAMETERS // 8
    assert states.weights.device == size * PARAMETERS
    assert states.optimizer.device == pytest.approx(12 * share, abs=100)
    assert states.step == pytest.approx((4 + flattened) * share, abs=100)


def held(states: StateBytes) -> int:
    """Bytes of everything but weights and gradients, wherever it is."""
    optimizer, buckets = states.optimizer, states.buckets
    return sum((optimizer.device, optimizer.host, optimizer.nvme, buckets.host))


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp32])
@pytest.mark.parametrize(
    ("stage", "rung"),
    [
        *((stage, "none") for stage in (0, 1, 2, 3)),
        *((stage, "optimizer_cpu") for stage in (1, 2, 3)),
        *((3, rung) for rung in ("cpu", "optimizer_nvme", "nvme")),
    ],
)
def test_one_state_less_is_four_bytes_less_for_each_parameter_everywhere(
    stage: int, rung: str, precision: Precision
) -> None:
    shape = shape_of("tuner=full")
    placement = make_placement(stage, rung, trains_all=True)
    adamw, lion = (states_of(shape, placement, precision, 8, one) for one in (ADAMW, LION))
    share = PARAMETERS if stage == 0 else PARAMETERS / 8
    less = held(adamw) - held(lion)
    if placement.optimizer == "nvme":
        # And one of four swap buffers.
        less -= adamw.buckets.host - lion.buckets.host
        assert adamw.buckets.host > lion.buckets.host
        written = adamw.nvme_written_per_step - lion.nvme_written_per_step
        assert written == adamw.optimizer.nvme - lion.optimizer.nvme
    assert less == pytest.approx(4 * share, rel=1e-4)
    assert (adamw.weights, adamw.gradients, adamw.step) == (
        lion.weights,
        lion.gradients,
        lion.step,
    )


def test_stage_3_gathers_the_head_with_the_last_layer_and_a_layer_with_what_is_prefetched() -> None:
    shape = shape_of("tuner=full")
    assert (shape.head_parameters, shape.layer_parameters) == (HEAD, LAYER)
    placement = make_placement(3, "none", trains_all=True)
    sizes = resolve_zero_sizes(shape, placement, ADAMW, 8, "cuda")
    assert sizes.prefetch == LAYER * 7 // 20
    assert gathered_bytes(shape, placement, sizes, 2) == (
        2 * (HEAD + LAYER),
        2 * max(LAYER + 2 * sizes.prefetch, HEAD),
    )
    assert gathered_bytes(shape, make_placement(2, "none", trains_all=True), sizes, 2) == (0, 0)


@pytest.mark.parametrize(("optimizer", "numbers"), [(ADAMW, 3), (LION, 2)])
def test_a_full_checkpoint_is_the_model_and_the_fp32_numbers_of_the_optimizer(
    optimizer: Optimizer, numbers: int
) -> None:
    arithmetic = Arithmetic(Precision.bf16, optimizer)
    assert checkpoint_bytes(shape_of("tuner=full"), arithmetic) == pytest.approx(
        (2 + 4 * numbers) * PARAMETERS, rel=1e-6
    )


def collectives(
    monkeypatch: pytest.MonkeyPatch, stage: int, rung: str, passes: int, *overrides: str
) -> list[float]:
    """Bytes that a micro-batch sends, collective by collective; a repeated one as often as it
    is.
    """
    shape = shape_of(*overrides)
    kind = "tuner=full" in overrides
    hardware: Any = None
    cluster = speed.Cluster(hardware, 8)
    sent: list[float] = []

    def take_a_second(_: speed.Cluster, nbytes: float) -> float:
        sent.append(nbytes)
        return 1.0

    monkeypatch.setattr(speed.Cluster, "collective_seconds", take_a_second)
    seconds = speed._gather_seconds(
        shape, make_placement(stage, rung, kind), passes, Precision.bf16, cluster
    )
    return [*sent, seconds]


def test_what_is_sent_follows_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    full = 2.0 * PARAMETERS
    assert collectives(monkeypatch, 1, "none", 3, "tuner=full") == [0.0]
    assert collectives(monkeypatch, 2, "none", 3, "tuner=full") == [full, 1.0]
    # Weights in the forward and in the backward pass, and the gradients.
    assert collectives(monkeypatch, 3, "none", 3, "tuner=full") == [full, full, 3.0]
    # From NVMe a recomputed layer is fetched a third time.
    assert collectives(monkeypatch, 3, "nvme", 3, "tuner=full") == [full, full, 4.0]


def test_an_optimizer_step_touches_its_numbers_once_or_as_often_as_its_kernels_do() -> None:
    # Reads weight, gradient and two moments; writes three of them, and the weight in 16 bits.
    assert speed.step_bytes(ADAMW) == 4 * 4 + 3 * 4 + 2
    # m and g to a direction; its sign; decay; the direction to the weight; m and g to m; 16 bits.
    assert speed.step_bytes(LION) == 12 + 8 + 8 + 12 + 12 + 2


@pytest.mark.parametrize(
    ("stage", "rung", "ranks"),
    [(0, "none", 1), (0, "none", 8), (2, "none", 8), (3, "none", 8), (2, "optimizer_cpu", 8)],
)
def test_muon_makes_five_steps_of_each_matrix_on_one_rank_and_sends_it_twice(
    stage: int, rung: str, ranks: int
) -> None:
    config = compose_config(["model=llama3_8b", "tuner=full", "optim=muon"]).config
    shape = resolve_shape(config.model, config.tuner, Path(config.paths.cache_dir))
    shape = assign_groups(shape, groups_of_shape(config.optim, config.tuner, shape))
    hardware = Hardware(
        accelerator="cuda",
        device_count=ranks,
        device_memory_bytes=10**11,
        host_memory_bytes=10**12,
        flops=1e15,
        efficiency=0.5,
        link_bandwidth=1e11,
        pcie_bandwidth=2e10,
    )
    terms = speed._matrix_terms(
        shape, make_placement(stage, rung, True), MUON, speed.Cluster(hardware, ranks)
    )
    # Query and output projection; key and value; gate, up and down projection.
    sides = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(4096, 14_336)] * 3
    elements = 32 * sum(short * long for short, long in sides)
    operations = [5 * (4 * s * s * long + 2 * s**3) for s, long in sides]
    if ranks == 1:
        seconds = 32 * sum(operations) / 5e14
    elif stage < 3:
        # Eight of seven a layer: one of the largest is in each of 28 turns.
        seconds = 28 * operations[-1] / 5e14
    else:
        # A sub-group ends with the matrix that brings it to 100 M elements a rank.
        order = [*sides[:1], *sides[2:4], sides[1], *sides[4:]] * 32
        groups: list[list[tuple[int, int]]] = [[]]
        for one in order:
            if sum(short * long for short, long in groups[-1]) >= 800e6:
                groups.append([])
            groups[-1].append(one)
        cost = dict(zip(sides, operations, strict=True))
        turns = [group[at : at + 8] for group in groups for at in range(0, len(group), 8)]
        seconds = sum(max(cost[one] for one in turn) for turn in turns) / 5e14
    assert terms["directions of matrices"] == pytest.approx(seconds)
    trips = {0: 0 if ranks == 1 else 1}.get(stage, 2)
    sent = trips * 4 * elements * 7 / 8 / 1e11
    moved = 2 * 4 * elements / ranks / 2e10 if rung == "optimizer_cpu" else 0.0
    assert terms["matrices to a rank and back"] == pytest.approx(sent + moved)
    assert speed._matrix_terms(shape, Placement(stage), ADAMW, speed.Cluster(hardware, 8)) == {}


def logits_of(*overrides: str) -> list[int]:
    config = compose_config(
        ["model=llama3_8b", "hardware=8xa100_80gb", "data.train=a.jsonl", *overrides]
    ).config
    ladder: Ladder = resolve_ladder(config, planning=True)
    return [
        rung.candidate.memory.device.logits for rung in ladder.rungs if rung.candidate is not None
    ]


MANY_ROWS = ["train.per_device_eval_batch_size=512", "data.max_seq_length=2048"]


def test_an_evaluation_of_many_rows_needs_room_for_its_logits_unless_there_is_none() -> None:
    # An adapter on the head: the loss is computed from logits.
    many = [*MANY_ROWS, "tuner.target_modules=[q_proj,lm_head]"]
    # Half precision, their fp32 copy and the log-probabilities: ten bytes each.
    needed = 512 * 2048 * 128_256 * 10
    assert min(logits_of(*many)) > 0.8 * needed
    assert max(logits_of(*many, "data.val_set_size=0")) < 0.2 * needed
    assert min(logits_of(*many, "data.val_set_size=0", "data.eval=b.jsonl")) > 0.8 * needed


def test_a_loss_in_the_head_needs_room_for_a_chunk_of_logits() -> None:
    # Hidden states twice, in half precision, and 523 positions of logits in it and in fp32.
    rows = 2**26 // 128_256
    needed = 2 * 2 * 512 * 2048 * 4096 + rows * 128_256 * 6
    longest = max(logits_of(*MANY_ROWS))
    assert 0.2 * needed < longest <= needed
    # One row of 8,192 tokens, which is trained: the gradient of the hidden states in fp32, too.
    one = ["train.per_device_train_batch_size=1", "data.max_seq_length=8192", "data.val_set_size=0"]
    trained = 8192 * 4096 * (2 * 2 + 4) + rows * 128_256 * 6
    assert set(logits_of(*one)) == {trained}
    # A trained head has a gradient as large as itself, and no logits beside it.
    full = 8192 * 4096 * (2 * 2 + 4 + 4) + 2 * 128_256 * 4096 + 8192 * 8192 * 6
    assert set(logits_of(*one, "tuner=full")) == {full}


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (3, 4)])
def test_four_bits_are_half_a_byte_a_byte_a_block_and_four_a_block_of_blocks(
    stage: int, ranks: int
) -> None:
    """Layers are quantized; embedding, head and norms are bf16; scales are partitioned too."""
    shape = shape_of("tuner=qlora")
    norms = (2 * 32 + 1) * 4096
    quantized = PARAMETERS - 2 * HEAD - norms
    assert shape.quantized_parameters == quantized
    placement = make_placement(stage, "none", trains_all=False)
    states = states_of(shape, placement, Precision.bf16, ranks)
    scales = quantized / 64 + 4 * quantized / (64 * 256)
    packed = quantized // 2 + 2 * (2 * HEAD + norms)
    assert states.weights.device == pytest.approx((packed + scales) / ranks, rel=1e-6)
    plain = states_of(
        shape_of("tuner=qlora", "tuner.bnb_4bit_use_double_quant=false"),
        placement,
        Precision.bf16,
        ranks,
    )
    assert plain.weights.device == pytest.approx((packed + 4 * quantized / 64) / ranks, rel=1e-6)
