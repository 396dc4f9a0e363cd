"""The share of a model's weights that adapters reach is said before training begins."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llmtune.config.compose import compose_config
from llmtune.plan.resolve import plan_candidate, resolve_ladder
from llmtune.tuner.coverage import Weight, describe_coverage
from tests.architectures.families import FAMILIES


def note(family: str | None, *overrides: str) -> str:
    config = compose_config(["model=tiny", "data.max_seq_length=64", *overrides]).config
    if family is not None:
        numbers: dict[str, Any] = {"model_type": family, **FAMILIES[family]}
        config = replace(config, model=replace(config.model, config=numbers))
    ladder = resolve_ladder(config)
    assert ladder.chosen is not None
    notes = plan_candidate(config, ladder, ladder.chosen).notes
    found = [one for one in notes if one.startswith("adapters reach")]
    assert len(found) == (0 if "tuner=full" in overrides else 1)
    return found[0] if found else ""


def test_each_kind_of_module_is_said() -> None:
    text = note(None)
    assert "attention 100 %, MLP 100 %" in text
    assert "embeddings 0 %" in text
    text = note("mixtral")
    assert "experts 0 %" in text
    assert "routers 0 %" in text
    assert "attention 100 %" in text
    text = note(None, "tuner.target_modules=[q_proj]", "tuner.layers_to_transform=[0]")
    assert "MLP 0 %" in text
    assert "attention 100 %" not in text
    assert note(None, "tuner=full") == ""


@pytest.mark.parametrize(
    ("reached", "text"), [(0, "0 %"), (1, "0.1 %"), (500, "50 %"), (9_999, "99.9 %")]
)
def test_a_share_is_rounded_to_all_or_nothing_only_where_it_is(reached: int, text: str) -> None:
    rest = 1_000 - reached if reached < 1_000 else 1
    weights = [Weight("a.mlp.x", reached, reached), Weight("b.mlp.y", rest, 0)]
    assert describe_coverage(weights) == f"adapters reach {text} of the weights: MLP {text}"
