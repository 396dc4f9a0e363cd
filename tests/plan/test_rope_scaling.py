"""``model.rope_scaling``: what is asked is computed, for every architecture, or refused."""

from __future__ import annotations

import math
import re
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmtune.config.compose import compose_config
from llmtune.config.groups.model import ModelConfig
from llmtune.errors import ConfigError
from llmtune.plan.architecture.load import load_architecture
from llmtune.plan.resolve import resolve_ladder
from llmtune.run.settings import find_problems
from tests.architectures.families import FAMILIES
from tests.support import first

SIZE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
KINDS = ("linear", "yarn", "llama3")
HEAD, BASE, KNOWN = 32, 10_000.0, 16


def asked(kind: str, factor: float = 4.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "factor": factor, **more}


def by_hand(kind: str, factor: float) -> tuple[list[float], float]:
    """Frequencies and the scale of cosine and sine, written out from the papers."""
    plain = [BASE ** (-2 * i / HEAD) for i in range(HEAD // 2)]
    if kind == "linear":
        return [f / factor for f in plain], 1.0
    found = []
    if kind == "llama3":
        for frequency in plain:
            turns = KNOWN * frequency / (2 * math.pi)
            share = min(1.0, max(0.0, (turns - 1) / (4 - 1)))
            found.append((1 - share) * frequency / factor + share * frequency)
        return found, 1.0

    def index(turns: float) -> float:
        return HEAD * math.log(KNOWN / (turns * 2 * math.pi)) / (2 * math.log(BASE))

    low, high = max(math.floor(index(32)), 0), min(math.ceil(index(1)), HEAD - 1)
    for i, frequency in enumerate(plain):
        ramp = min(1.0, max(0.0, (i - low) / max(high - low, 0.001)))
        found.append(ramp * frequency / factor + (1 - ramp) * frequency)
    return found, 0.1 * math.log(factor) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_the_paper(kind: str) -> None:
    config = ModelConfig(
        name_or_path="x", config={"model_type": "llama", **SIZE}, rope_scaling=asked(kind)
    )
    model: Any = AutoModelForCausalLM.from_config(load_architecture(config))
    frequencies, scale = by_hand(kind, 4.0)
    rotary = model.model.rotary_emb
    assert rotary.inv_freq.tolist() == pytest.approx(frequencies, rel=1e-5)
    assert rotary.attention_scaling == pytest.approx(scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_answers_otherwise_or_is_refused(family: str, kind: str) -> None:
    """The configuration is refused, or is what transformers' own reading of it gives back."""
    given = {"model_type": family, **deepcopy(FAMILIES[family])}
    config = ModelConfig(name_or_path="x", config=given, rope_scaling=asked(kind))
    refusal = ""
    scaled: Any = None
    try:
        scaled = load_architecture(config)
    except ConfigError as error:
        refusal = str(error)
    if scaled is None:
        assert "leave model.rope_scaling out" in refusal
        return
    stored = scaled.to_dict()
    back: Any = AutoConfig.for_model(stored.pop("model_type"), **stored)
    text, again = scaled.get_text_config(), back.get_text_config()
    assert again.rope_parameters == text.rope_parameters
    assert again.max_position_embeddings == text.max_position_embeddings
    entry = text.rope_parameters.get("full_attention", text.rope_parameters)
    assert (entry["rope_type"], entry["factor"]) == (kind, 4.0)


@pytest.mark.parametrize("kind", first(1, KINDS))
def test_positions_are_multiplied(kind: str) -> None:
    job = ["model=tiny", "model.config.max_position_embeddings=64", "data.max_seq_length=128"]
    (refusal,) = resolve_ladder(compose_config(job).config, planning=True).refusals
    for part in ("128", "64 positions", "model.rope_scaling={rope_type: yarn, factor: 2}"):
        assert part in refusal
    scaled = [*job, f"model.rope_scaling={{rope_type: {kind}, factor: 2}}"]
    ladder = resolve_ladder(compose_config(scaled).config, planning=True)
    assert ladder.refusals == ()
    assert ladder.shape.max_positions == 128
    assert any(f"scaled ({kind}, factor 2)" in note for note in ladder.notes)
    longer = compose_config([*scaled, "data.max_seq_length=200"]).config
    (refusal,) = resolve_ladder(longer, planning=True).refusals
    assert "factor: 4}" in refusal


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("tiny_bert", "has no rotary positions"),
        ("tiny_roberta", "has no rotary positions"),
        ("llama31_8b", r"scaled already \(llama3\)"),
        ("gpt_oss_20b", r"scaled already \(yarn\)"),
        ("gemma3_4b", r"scaled already \(linear\)"),
    ],
)
def test_what_cannot_be_scaled_is_refused(model: str, reason: str) -> None:
    given = [f"model={model}", "model.rope_scaling={rope_type: linear, factor: 2}"]
    with pytest.raises(ConfigError, match=reason):
        load_architecture(compose_config(given, planning=True).config.model)


def test_only_the_layers_that_see_the_whole_row_are_scaled() -> None:
    given = ["model=gemma3_1b", "model.rope_scaling={rope_type: linear, factor: 2}"]
    architecture: Any = load_architecture(compose_config(given, planning=True).config.model)
    assert architecture.rope_parameters["sliding_attention"]["rope_type"] == "default"
    assert architecture.rope_parameters["full_attention"]["factor"] == 2
    assert architecture.max_position_embeddings == 65_536


@pytest.mark.parametrize(
    ("scaling", "reason"),
    [
        ("{rope_type: dynamic, factor: 2}", "a resumed run would go on otherwise"),
        ("{rope_type: longrope, factor: 2}", "a factor for every frequency"),
        ("{rope_type: yearn, factor: 2}", "rope_type is one of linear, yarn, llama3"),
        ("{factor: 2}", "rope_type is one of"),
        ("{rope_type: yarn}", "factor must be a number above 1"),
        ("{rope_type: yarn, factor: 1}", "factor must be a number above 1"),
        ("{rope_type: yarn, factor: four}", "factor must be a number above 1"),
        ("{rope_type: linear, factor: 2, beta_fast: 3}", "has no key beta_fast"),
        ("{rope_type: yarn, factor: 2, beta_fats: 3}", "did you mean 'beta_fast'"),
        ("{rope_type: yarn, factor: 2, beta_fast: -1}", "beta_fast must be a number above 0"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_key(scaling: str, reason: str) -> None:
    config = compose_config(["model=tiny", f"model.rope_scaling={scaling}"]).config
    (problem, *_) = find_problems(config)
    assert re.search(reason, problem)
    assert problem.startswith("model.rope_scaling=")
    # Verbs that train nothing find it when they look at the model.
    with pytest.raises(ConfigError, match=reason):
        load_architecture(config.model)


def test_a_scaled_model_is_another_one() -> None:
    """Positions that the model cannot tell apart would make the test above say nothing."""
    torch.manual_seed(0)
    plain: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZE)).eval()
    config = ModelConfig(
        name_or_path="x", config={"model_type": "llama", **SIZE}, rope_scaling=asked("linear", 2.0)
    )
    scaled: Any = AutoModelForCausalLM.from_config(load_architecture(config)).eval()
    scaled.load_state_dict(plain.state_dict())
    tokens = torch.randint(97, (1, 30))
    positions = torch.arange(30).float()[None] / 2
    with torch.no_grad():
        expected = plain(input_ids=tokens, position_ids=positions).logits
        assert torch.allclose(scaled(input_ids=tokens).logits, expected, atol=1e-5)
        assert not torch.allclose(plain(input_ids=tokens).logits, expected, atol=1e-3)
