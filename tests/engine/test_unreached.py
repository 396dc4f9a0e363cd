"""Trained tensors that no gradient reaches are found in every stage, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtune.train.hooks import gradient_check
from llmtune.train.hooks.gradient_check import GradientCheck
from tests.engine.test_parity import FAST
from tests.support import first, train_engines

CUT = "layers.1.self_attn.k_proj.lora_B"
#: ZeRO stage, rung, optimizer.
PLACES = [
    ("0", "none", "adamw"),
    ("2", "none", "muon"),
    ("3", "none", "adamw_8bit"),
    ("3", "cpu", "adamw"),
]


@pytest.mark.process
@pytest.mark.parametrize("places", first(1, [PLACES[2:], PLACES[:2]]), ids=["ZeRO 3", "others"])
def test_a_matrix_without_a_gradient_is_found_with_the_one_behind_it(
    places: list[tuple[str, str, str]], tmp_path: Path
) -> None:
    """Without B no gradient reaches A either."""
    base = [*FAST, "precision=bf16", "tuner=dora"]
    tasks = [
        {
            "overrides": [*base, f"zero={stage}", f"offload={rung}", f"optim={kind}"],
            "first": 0,
            "last": 2,
            **more,
        }
        for stage, rung, kind in places
        for more in ({"without_gradient": CUT}, {})
    ]
    found = train_engines(tasks, 2, tmp_path)
    for place, cut, whole in zip(places, found[::2], found[1::2], strict=True):
        stem = "base_model.model.model.layers.1.self_attn.k_proj"
        names = [f"{stem}.lora_A.default.weight", f"{stem}.lora_B.default.weight"]
        assert cut["unreached"] == names, place
        assert whole["unreached"] == [], place


@pytest.mark.parametrize(
    ("steps", "looks_after"),
    [
        # A learning rate of 0 moves nothing, and a step that was skipped neither.
        ([(1e-3, True), (1e-3, True), (1e-3, True)], 2),
        ([(0.0, True), (1e-3, True), (1e-3, True)], 3),
        ([(1e-3, False), (1e-3, True), (1e-3, False), (1e-3, True)], 4),
    ],
)
def test_it_is_looked_for_once_when_both_matrices_can_have_moved(
    steps: list[tuple[float, bool]], looks_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Any] = []
    said: list[str] = []
    module: Any = object()

    def find(of: Any) -> list[str]:
        looked.append(of)
        return ["a", "b", "c", "d", "e"]

    monkeypatch.setattr(gradient_check, "find_unreached", find)
    check = GradientCheck(module, said.append)
    for number, (rate, applied) in enumerate([*steps, (1e-3, True)], 1):
        check.after_step(rate, applied)
        assert looked == ([module] if number >= looks_after else []), number
    (text,) = said
    assert "gradient of 5 trained tensors was exactly zero" in text
    assert "a, b, c, d ..." in text


def test_rows_of_tokens_that_do_not_occur_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no fault of the model."""
    said: list[str] = []
    rows = "model.embed_tokens.token_adapter.trainable_tokens_delta.default"
    monkeypatch.setattr(gradient_check, "find_unreached", lambda _: ["a", rows])
    module: Any = object()
    check = GradientCheck(module, said.append)
    for _ in range(3):
        check.after_step(1e-3, applied=True)
    of_rows, of_others = said
    assert f"no row of the first steps holds a token of {rows}" in of_rows
    assert "gradient of 1 trained tensors was exactly zero" in of_others
    assert rows not in of_others
