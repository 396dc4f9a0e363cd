"""Documents of a packed row are tried for leaks: exactly, on any architecture, and on what is right
as well.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune.config.compose import compose_config
from llmtune.data.load.collate import Collator
from llmtune.data.store.token_store import Row
from llmtune.errors import ConfigError
from llmtune.model.attention import answer_on_host
from llmtune.plan.architecture.shrink import MAX_LAYERS, shrink
from llmtune.run.check_model import check_model
from llmtune.train.hooks.packing_probe import (
    LENGTHS,
    LIMITS,
    SMALL_LIMIT,
    Mixing,
    check_module,
    draw_documents,
    find_leak,
    measure_mixing,
    try_architecture,
)
from tests.architectures.families import FAMILIES, MIXING

#: Of some architectures, such as RWKV and Falcon, transformers asks for compilers in processes.
pytestmark = pytest.mark.process


def configuration(family: str) -> Any:
    numbers = dict(FAMILIES[family])
    return AutoConfig.for_model(str(numbers.pop("model_type", family)), **numbers)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_architecture_is_known_by_a_small_model_of_it(family: str, kernel: str) -> None:
    found = find_leak(configuration(family), kernel, False)
    if found is None:
        # It has no such kernel.
        assert kernel == "sdpa"
        return
    assert (found.largest > SMALL_LIMIT) == (family in MIXING), found
    # Nothing lies near the limit.
    assert not SMALL_LIMIT / 3 < found.largest < 3 * SMALL_LIMIT, found


@pytest.mark.parametrize(
    ("family", "numbers", "leaks"),
    [
        (
            "llama",
            {
                "hidden_size": 8192,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
            },
            False,
        ),
        ("gemma3_text", {}, False),
        ("gpt_oss", {}, False),
        ("deepseek_v3", {}, False),
        ("qwen3_next", {}, True),
        ("jamba", {}, True),
        (
            "lfm2",
            {
                "layer_types": ["conv", "conv", "full_attention"] * 5 + ["conv"],
                "num_hidden_layers": 16,
            },
            True,
        ),
    ],
)
def test_models_of_full_size_are_tried_as_small_ones(
    family: str, numbers: dict[str, Any], leaks: bool
) -> None:
    found = find_leak(AutoConfig.for_model(family, **numbers), "eager", False)
    assert found is not None
    assert (found.largest > SMALL_LIMIT) == leaks


def test_a_small_model_has_the_kinds_of_layers_of_the_large_one() -> None:
    large = AutoConfig.for_model("gemma3_text", num_hidden_layers=62)
    small = shrink(large)
    assert small.num_hidden_layers == MAX_LAYERS
    assert (
        set(small.layer_types) == set(large.layer_types) == {"sliding_attention", "full_attention"}
    )
    assert large.num_hidden_layers == 62, "the model's own configuration is left as it is"
    assert sum(p.numel() for p in AutoModelForCausalLM.from_config(small).parameters()) < 1e6


def test_the_trial_packs_as_training_does() -> None:
    seen: list[Any] = []

    def forward(batch: Any) -> torch.Tensor:
        seen.append(batch)
        return torch.zeros(*batch.input_ids.shape, 7)

    one, other = draw_documents((3, 2), 97)
    measure_mixing(forward, Collator(pad_token_id=0), (one, other))
    ids = np.concatenate([one.ids, other.ids])
    expected = Collator(pad_token_id=0).pack(
        [
            Row(ids=ids, mask=np.ones(5, bool), documents=(3, 2)),
            Row(
                ids=np.concatenate([other.ids, one.ids]),
                mask=np.ones(5, bool),
                documents=(2, 3),
            ),
        ]
    )
    assert torch.equal(seen[0].input_ids, expected.input_ids)
    assert seen[0].position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "opt", "qwen3_moe", "mamba", "rwkv", "recurrent_gemma"]
)
def test_the_model_itself_is_judged_in_its_own_precision(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        configuration(family), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        # As much as is learned in training: a model that was just drawn takes little notice of what
        # stands before.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model = model.to(dtype)
    answer_on_host(model)
    documents = draw_documents((LENGTHS[0] // 2, LENGTHS[1]), 128)
    with torch.no_grad():
        found = measure_mixing(
            lambda batch: model(**batch.inputs, use_cache=False).logits,
            Collator(pad_token_id=0),
            documents,
        )
    assert (found.mean_square > LIMITS[dtype]) == (family in MIXING), found


def test_what_is_no_number_proves_nothing() -> None:
    from llmtune.train.hooks.packing_probe import _describe_leak

    assert _describe_leak(0.0, SMALL_LIMIT, "m", "llama") is None
    assert _describe_leak(float("nan"), SMALL_LIMIT, "m", "llama") is not None


def test_packing_is_refused_before_the_ranks_with_what_to_do(tmp_path: Path) -> None:
    from tests.model.test_weights import save_model

    folder = save_model("lfm2", tmp_path / "m")
    packed, alone = (
        compose_config(
            [f"model.name_or_path={folder}", "data.train=x.jsonl", f"data.packing={on}"]
        ).config
        for on in ("true", "false")
    )
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"data.packing=true: .*transformers' lfm2.*Take data.packing=false"
        ):
            check_model(packed, "eager", folder, tmp_path / "cache", lambda _: None)
    check_model(alone, "eager", folder, tmp_path / "cache", lambda _: None)


def logits_of(bad: dict[tuple[int, int], float]) -> Any:
    """A model that answers the same everywhere, but for some positions."""

    def forward(batch: Any) -> torch.Tensor:
        logits = torch.linspace(-1, 1, 7).expand(*batch.input_ids.shape, 7).clone()
        for place, value in bad.items():
            logits[place] = value
        return logits

    return forward


@pytest.mark.parametrize(
    ("place", "alone", "behind"),
    [
        ((0, 1), (0,), ()),
        ((1, 0), (1,), ()),
        ((0, 4), (), (1,)),
        ((1, 3), (), (0,)),
        ((0, 3), (), (1,)),
    ],
)
def test_documents_without_numbers_are_named(
    place: tuple[int, int], alone: Any, behind: Any
) -> None:
    found = measure_mixing(
        logits_of({place: float("nan")}), Collator(pad_token_id=0), draw_documents((3, 2), 97)
    )
    assert (found.nan_alone, found.nan_behind) == (alone, behind)


def test_infinite_logits_are_numbers_where_both_have_them() -> None:
    """Some architectures give tokens that cannot be said a logit of minus infinity."""
    everywhere = {(row, position): float("-inf") for row in range(2) for position in range(5)}

    def forward(batch: Any) -> torch.Tensor:
        logits: torch.Tensor = logits_of({})(batch)
        logits[..., 0] = float("-inf")
        return logits

    found = measure_mixing(forward, Collator(pad_token_id=0), draw_documents((3, 2), 97))
    assert (found.largest, found.nan_alone, found.nan_behind) == (0.0, (), ())
    assert (
        measure_mixing(
            logits_of(everywhere), Collator(pad_token_id=0), draw_documents((3, 2), 97)
        ).largest
        == 0.0
    )
    leak = measure_mixing(
        logits_of({(0, 4): float("-inf")}), Collator(pad_token_id=0), draw_documents((3, 2), 97)
    )
    assert leak.largest > SMALL_LIMIT


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            {(0, 1): float("nan"), (1, 0): float("nan")},
            r"model.name_or_path=m: the model answers with NaN: .* logits of the first and the"
            r" second are NaN at the "
            r"beginning of the row.*take bf16 or fp32",
        ),
        (
            {(1, 3): float("nan")},
            r"the model answers with NaN: .* logits of the second are NaN at the beginning",
        ),
        (
            {(0, 50): float("nan")},
            r"data.packing=true: m answers with NaN behind another .* logits of the second are NaN",
        ),
        ({(0, 50): 3.0}, r"data.packing=true: m does not keep the documents of a row apart"),
    ],
)
def test_a_model_that_answers_with_nan_is_no_leak(
    bad: dict[tuple[int, int], float], message: str
) -> None:
    module: Any = SimpleNamespace(
        logits=logits_of(bad),
        rank=SimpleNamespace(world_size=1),
        model=SimpleNamespace(config=SimpleNamespace(model_type="llama")),
    )
    with pytest.raises(ConfigError, match=message):
        check_module(module, Collator(pad_token_id=0), 97, torch.float32, "m")


def test_rows_of_a_batch_that_see_each_other_have_another_remedy() -> None:
    module: Any = SimpleNamespace(
        logits=logits_of({(0, 50): 3.0}),
        rank=SimpleNamespace(world_size=1),
        model=SimpleNamespace(config=SimpleNamespace(model_type="llama")),
    )
    with pytest.raises(ConfigError, match=r"attn_implementation=varlen: m does not .*=sdpa: rows"):
        check_module(
            module,
            Collator(pad_token_id=0),
            97,
            torch.float32,
            "m",
            packed=False,
        )


def test_a_model_whose_weights_are_nan_is_told_so() -> None:
    model = AutoModelForCausalLM.from_config(
        configuration("llama"), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
        found = measure_mixing(
            lambda batch: model(**batch.inputs, use_cache=False).logits,
            Collator(pad_token_id=0),
            draw_documents((9, 5), 128),
        )
    assert (found.nan_alone, found.nan_behind) == ((0, 1), (0, 1))


def test_a_small_model_that_answers_with_nan_alone_decides_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its weights are random; those of the model itself are tried before step 1."""
    nan = float("nan")
    said = {}
    for case, found in {
        "alone": Mixing(largest=nan, mean_square=nan, nan_alone=(0, 1), nan_behind=(0, 1)),
        "behind": Mixing(largest=nan, mean_square=nan, nan_alone=(), nan_behind=(1,)),
    }.items():
        monkeypatch.setattr(
            "llmtune.train.hooks.packing_probe.find_leak", lambda *_, found=found: found
        )
        said[case] = try_architecture(configuration("llama"), "eager", "m", False)
    assert said["alone"] is None
    assert "m answers with NaN behind another document" in str(said["behind"])
