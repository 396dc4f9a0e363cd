"""The number of recomputed layers: its bytes against real traces, its speed, and its choice."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.config.compose import compose_config
from llmtune.config.schema import Config, Precision
from llmtune.errors import ConfigError
from llmtune.plan.abilities import NEVER, ONE_BY_ONE, TOGETHER, check_recomputing
from llmtune.plan.architecture.load import load_architecture
from llmtune.plan.devices.probe import resolve_hardware
from llmtune.plan.ladder import Candidate, choose, next_candidate
from llmtune.plan.memory.model_shape import resolve_shape
from llmtune.plan.memory.rank_bytes import ActivationBytes
from llmtune.plan.memory.recomputed_layers import RecomputedLayers
from llmtune.plan.memory.trace import activations, fake_run
from llmtune.plan.memory.trace.activations import ActivationModel
from llmtune.plan.memory.trace.fake_run import TraceSettings, trace_layers
from llmtune.plan.resolve import resolve_ladder
from llmtune.plan.search import Search, search_layers
from llmtune.plan.speed import step_flops

LAYERS = 6


def trace_some(
    config: Config, traced: TraceSettings, count: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, int]:
    """Trace all layers of a model, of which the first ``count`` are recomputed.

    Returns:
        The bytes that are held at the end of the forward pass, and at the peak.
    """
    build = fake_run._build

    def build_some(*arguments: Any) -> Any:
        model = build(*arguments)
        for layer in list(fake_run._layers(model))[count:]:
            layer.gradient_checkpointing = False
        return model

    shape = resolve_shape(config.model, config.tuner)
    trained = [tensor.name for tensor in shape.tensors if tensor.trained]
    with monkeypatch.context() as patch:
        patch.setattr(fake_run, "TRACED_LAYERS", LAYERS)
        patch.setattr(fake_run, "_build", build_some)
        trace = trace_layers(load_architecture(config.model), config.tuner, traced, trained)
    return trace.held, trace.peak


@pytest.mark.parametrize(
    ("tuner", "model"), [("full", "llama"), ("lora", "qwen3"), ("lora", "gpt2")]
)
def test_bytes_of_every_number_are_those_of_a_trace(
    tuner: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held bytes are within 1 %, and the peak is not below that of the trace by more."""
    numbers = ["model=tiny", f"model.config.model_type={model}"]
    config = compose_config(
        [*numbers, f"model.config.num_hidden_layers={LAYERS}", f"tuner={tuner}"]
    ).config
    shape = resolve_shape(config.model, config.tuner)
    found = ActivationModel(config.model, config.tuner, shape)
    traced = TraceSettings(
        rows=1,
        length=512,
        gradient_checkpointing=True,
        attn_implementation="sdpa",
        precision=Precision.bf16,
        zero3=False,
    )
    for count in range(LAYERS + 1):
        planned = found.of_layers(traced, RecomputedLayers(count, LAYERS))
        held, peak = trace_some(config, traced, count, monkeypatch)
        assert planned.origin == "traced"
        assert planned.saved == pytest.approx(held, rel=0.01), count
        assert peak * 0.99 <= planned.saved + planned.working <= peak * 1.10, count


BYTES = st.integers(min_value=0, max_value=10**12)


@given(ends=st.tuples(BYTES, BYTES, BYTES, BYTES), total=st.integers(min_value=1, max_value=200))
@settings(deadline=None)
def test_more_recomputed_layers_never_need_more(
    ends: tuple[int, int, int, int], total: int
) -> None:
    """Where recomputing all saves memory at all; ends are kept as they are traced."""
    plain, plain_working, small, small_working = ends
    plain = max(plain, small)

    class Ends(ActivationModel):
        def __init__(self) -> None:
            pass

        def __call__(self, traced: TraceSettings) -> ActivationBytes:
            every = traced.gradient_checkpointing
            return ActivationBytes(
                saved=small if every else plain,
                working=small_working if every else plain_working,
                logits=0,
            )

    traced = TraceSettings(
        rows=1,
        length=8,
        gradient_checkpointing=False,
        attn_implementation="sdpa",
        precision=Precision.bf16,
        zero3=False,
    )
    found = [Ends().of_layers(traced, RecomputedLayers(n, total)) for n in range(total + 1)]
    assert (found[0].saved, found[0].working) == (plain, plain_working)
    assert (found[-1].saved, found[-1].working) == (small, small_working)
    saved = [one.saved for one in found]
    assert saved == sorted(saved, reverse=True)
    # The first number may need more, where one layer has a larger peak than all have together.
    peaks = [one.saved + one.working for one in found[1:]]
    assert peaks == sorted(peaks, reverse=True)


@given(total=st.integers(min_value=1, max_value=120), least=st.integers(min_value=0, max_value=121))
def test_the_smallest_number_that_fits_is_found(total: int, least: int) -> None:
    asked: list[int] = []

    def evaluate(count: int) -> Any:
        asked.append(count)
        return Fake(count, count >= least)

    found = [as_fake(one) for one in search_layers(evaluate, total, one_by_one=True)]
    counts = [one.count for one in found]
    assert len(set(counts)) == len(counts)
    assert len(asked) == len(set(asked)) <= 14
    assert {0, total} <= set(counts)
    if least <= total:
        assert min(one.count for one in found if one.fits) == least
    together = [one.count for one in map(as_fake, search_layers(evaluate, total, False))]
    assert together == [0, total]


class Fake:
    """A candidate, as far as a search looks at it."""

    def __init__(self, count: int, fits: bool):
        self.count, self.fits = count, fits


def as_fake(candidate: Any) -> Fake:
    assert isinstance(candidate, Fake)
    return candidate


#: Three jobs, of which each needs another number of layers at another micro-batch.
JOBS = [
    [
        "model=llama2_7b",
        "model.rope_scaling={rope_type: linear, factor: 2.0}",
        "hardware=1xrtx4090",
        "train.global_batch_size=4",
    ],
    ["model=llama3_8b", "hardware=1xrtx4090", "train.global_batch_size=8"],
    ["model=llama3_8b", "tuner=full", "hardware=4xa100_80gb", "train.global_batch_size=16"],
]


@pytest.mark.parametrize("job", JOBS, ids=["7B", "8B", "8B, full, 4 GPUs"])
def test_the_choice_is_the_fastest_of_all_numbers_by_brute_force(
    job: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # An estimate has the form of a trace and takes no time.
    monkeypatch.setattr(
        ActivationModel, "_trace", lambda self, traced: activations.estimate(self.shape, traced)
    )
    config = compose_config(
        [*job, "data.train=a.jsonl", "data.max_seq_length=8192", "offload=none"]
    ).config
    ladder = resolve_ladder(config, planning=True)
    assert ladder.chosen is not None
    hardware = resolve_hardware(config.hardware, planning=True)
    search = Search(config, hardware, ladder.shape, ladder.world_size, ladder.attn_implementation)
    every: list[Candidate] = []
    seen = {(one.placement.zero_stage, one.batch.micro_batch_size) for one in ladder.candidates}
    for one in ladder.candidates:
        if (key := (one.placement.zero_stage, one.batch.micro_batch_size)) in seen:
            seen.discard(key)
            held = search.hold(one.placement, one.batch)
            every += [search.evaluate(held, count) for count in range(ladder.shape.layers + 1)]
    assert len(every) > 3 * ladder.shape.layers
    best = choose(every)
    assert best is not None
    assert best.key == ladder.chosen.key
    assert best.recomputed.is_partial
    assert best.speed.tokens_per_second > max(
        one.speed.tokens_per_second
        for one in every
        if one.fits and one.recomputed.count in (0, ladder.shape.layers)
    )

    # Memory ran out in its backward pass all the same.
    following = next_candidate(ladder, ladder.chosen, [ladder.chosen], "backward", "device")
    limit = 0.95 * ladder.chosen.memory.device.total
    smaller = [one for one in every if one.fits and one.memory.device.total < limit]
    assert (following is None) == (not smaller)
    if following is not None:
        assert following.memory.device.total < limit
        assert following.speed.tokens_per_second < ladder.chosen.speed.tokens_per_second


def test_a_number_is_obeyed_and_no_more_than_a_gradient_reaches() -> None:
    def chosen(*overrides: str) -> Candidate:
        config = compose_config(
            ["model=tiny", "model.config.num_hidden_layers=5", "hardware=laptop", *overrides]
        ).config
        found = resolve_ladder(config, planning=True).chosen
        assert found is not None
        return found

    assert chosen("train.gradient_checkpointing=2").recomputed == RecomputedLayers(2, 5)
    assert (
        chosen("train.gradient_checkpointing=5").key
        == chosen("train.gradient_checkpointing=true").key
    )
    frozen = ("tuner=freeze", "tuner.freeze.last_layers=2")
    assert chosen("train.gradient_checkpointing=4", *frozen).recomputed == RecomputedLayers(2, 2)
    assert "recomputed_layers" not in chosen("train.gradient_checkpointing=true").key
    assert chosen("train.gradient_checkpointing=2").key["recomputed_layers"] == 2
    with pytest.raises(ConfigError, match=r"gradient_checkpointing=6: .* has 5 layers; take at"):
        chosen("train.gradient_checkpointing=6")


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "some"])
def test_another_value_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="train.gradient_checkpointing"):
        compose_config(["model=tiny", f"train.gradient_checkpointing={value}"])


@pytest.mark.parametrize(
    ("setting", "recomputing", "message"),
    [
        (True, NEVER, "=true: transformers cannot compute the layers of m again"),
        (3, NEVER, "=3: transformers cannot"),
        (3, TOGETHER, "=3: the layers of m can be computed again together, not one by one"),
        (True, TOGETHER, None),
        (9, ONE_BY_ONE, "=9: m has 8 layers"),
        (8, ONE_BY_ONE, None),
        (False, NEVER, None),
        ("auto", NEVER, None),
    ],
)
def test_what_the_architecture_cannot_do_is_refused(
    setting: bool | int | str, recomputing: str, message: str | None
) -> None:
    if message is None:
        check_recomputing(setting, recomputing, 8, "m")
        return
    with pytest.raises(ConfigError, match=message):
        check_recomputing(setting, recomputing, 8, "m")


def test_an_architecture_that_cannot_recompute_is_planned_without() -> None:
    config = compose_config(
        [
            *("model.name_or_path=m", "model.config.model_type=openai-gpt", "tuner=full"),
            *("model.config.n_layer=3", "data.train=a.jsonl", "hardware=laptop"),
        ]
    ).config
    ladder = resolve_ladder(config, planning=True)
    assert {one.recomputed.count for one in ladder.candidates} == {0}


@given(counts=st.lists(st.integers(min_value=0, max_value=80), min_size=2, max_size=6, unique=True))
@settings(deadline=None, max_examples=20)
def test_arithmetic_grows_with_the_number(counts: list[int]) -> None:
    shape = resolve_shape(
        compose_config(["model=tiny"]).config.model, compose_config(["tuner=full"]).config.tuner
    )
    flops = [step_flops(shape, 64, count / 80) for count in sorted(counts)]
    assert flops == sorted(set(flops))
