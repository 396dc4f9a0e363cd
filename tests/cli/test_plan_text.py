"""The text of ``plan``: nothing is cut off, nothing is assumed without a word."""

from __future__ import annotations

import re

import pytest

from llmtune.cli import plan
from llmtune.cli.main import main
from llmtune.config.compose import compose_config
from llmtune.plan.resolve import resolve_plan
from tests.support import TINY

SMALL_CARDS = [
    "model=tiny",
    "hardware=2x3090",
    "hardware.gpu_memory_bytes=24GB",
    "hardware.host_memory_bytes=64GB",
]
LARGE = [
    "plan",
    "model=llama3_70b",
    "hardware=2x3090",
    "hardware.gpus_per_node=1",
    "hardware.host_memory_bytes=64GB",
]


@pytest.mark.parametrize("columns", [20, 80, 100, 132, 400])
def test_a_terminal_of_any_width_gets_every_letter(
    columns: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_terminal_width", lambda: columns)
    assert main(LARGE) == 3
    text = "".join(capfd.readouterr().out.split())
    needs = re.findall(r"GPUmemory:needs[\d.]+GBof[\d.]+GB", text)
    assert len(needs) == 2, text
    assert text.count("of58.9GB") == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("FOO9000", "the speed of FOO9000 is not known: 60 TFLOP/s"),
        ("4090", "did you mean hardware.gpu_name='RTX 4090'?"),
        ("RTX 4090", None),
    ],
)
def test_the_speed_of_an_unknown_card_is_said_to_be_assumed(
    name: str, said: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["plan", *SMALL_CARDS, f"hardware.gpu_name={name}", "hardware.gpus_per_node=1"]) == 0
    )
    out = capfd.readouterr().out
    assert (said or "RTX 4090") in out
    assert ("are assumed" in out) == (said is not None)
    set_speed = ["hardware.gpu_flops=1e14", f"hardware.gpu_name={name}", "hardware.gpus_per_node=1"]
    assert main(["plan", *SMALL_CARDS, *set_speed]) == 0
    assert "are assumed" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.01234, "0.0123 s"), (119.0, "119 s"), (8766.0, "2:26:06")]
)
def test_long_steps_are_told_in_hours(seconds: float, text: str) -> None:
    assert plan._describe_time(seconds) == text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["offload=none"], "placement: none as set, with ZeRO"),
        (["offload=cpu"], "placement: cpu as set, with ZeRO 3"),
        ([], "that fit"),
    ],
)
def test_what_was_set_is_not_said_to_be_chosen(overrides: list[str], said: str) -> None:
    notes = resolve_plan(compose_config([*TINY, *overrides]).config).notes
    assert said in "\n".join(notes)
