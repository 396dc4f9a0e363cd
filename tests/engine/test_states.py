"""The plan's bytes of ZeRO's states against what DeepSpeed allocates: the live engine's tensors and the swap folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import train_engines

#: Wide enough that slices are swapped (1 MiB and more), 14 M parameters in all.
MODEL = [
    *("model=tiny", "model.config.hidden_size=512", "model.config.intermediate_size=2304"),
    *("model.config.num_hidden_layers=2", "model.config.num_attention_heads=8", "model.config.num_key_value_heads=4"),
    *("model.config.head_dim=64", "model.config.vocab_size=4096", "model.config.tie_word_embeddings=false"),
    "tuner.lora_r=32",
]

PLACES = [
    *(
        (0, "none"),
        (1, "none"),
        (2, "none"),
        (3, "none"),
        (1, "optimizer_cpu"),
        (2, "optimizer_cpu"),
        (3, "optimizer_cpu"),
    ),
    *((3, "cpu"), (3, "optimizer_nvme"), (3, "nvme")),
]
CELLS = [
    (stage, rung, tuner, precision)
    for stage, rung in PLACES
    for tuner in ("full", "lora")
    for precision in ("bf16", "fp32")
    if not (rung == "optimizer_nvme" and tuner == "lora")
]


def test_there_are_enough_cells() -> None:
    assert len(CELLS) >= 24


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_states_are_within_one_percent_of_what_deepspeed_allocates(world_size: int, tmp_path: Path) -> None:
    # On one rank bf16 alone, on two both: 57 cells.
    cells = [cell for cell in CELLS if world_size == 2 or cell[3] == "bf16"]
    tasks = [
        {
            "overrides": [*MODEL, f"tuner={tuner}", f"precision={precision}"],
            "stage": stage,
            "rung": rung,
            "accumulation": 2 // world_size,
        }
        for stage, rung, tuner, precision in cells
    ]
    found = train_engines(tasks, world_size, tmp_path, module="tests.engine.measure")
    wrong = []
    for cell, result in zip(cells, found, strict=True):
        predicted, measured = result["predicted"], result["measured"]
        for kind in ("memory", "nvme"):
            if abs(predicted[kind] - measured[kind]) > 0.01 * max(measured[kind], 1):
                wrong.append((cell, kind, predicted[kind], measured[kind], result["categories"]))
    assert not wrong, "\n".join(map(str, wrong))
