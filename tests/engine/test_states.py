"""The plan's bytes of ZeRO's states against what DeepSpeed allocates: the live engine's tensors and
the swap folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import matrix, train_engines

#: Wide enough that slices are swapped (1 MiB and more), 14 M parameters in all.
MODEL = [
    *("model=tiny", "model.config.hidden_size=512", "model.config.intermediate_size=2304"),
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=8",
    "model.config.num_key_value_heads=4",
    "model.config.head_dim=64",
    "model.config.vocab_size=4096",
    "model.config.tie_word_embeddings=false",
    "tuner.lora_r=32",
]

SMOLLM2 = ["model=smollm2_135m"]

PLACES = [
    (0, "none"),
    (1, "none"),
    (2, "none"),
    (3, "none"),
    (1, "optimizer_cpu"),
    (2, "optimizer_cpu"),
    (3, "optimizer_cpu"),
    *((3, "cpu"), (3, "optimizer_nvme"), (3, "nvme")),
]
TUNERS, PRECISIONS, RANKS = ("full", "lora"), ("bf16", "fp32"), (2, 1)


def has_tuner(place: tuple[int, str], tuner: str = "full", *_: Any) -> bool:
    """``optimizer_nvme`` is for full fine-tuning: the states of adapters are too small for a
    disk.
    """
    return tuner == "full" or place[1] != "optimizer_nvme"


@pytest.mark.process
@pytest.mark.parametrize(
    "cells",
    matrix(PLACES, TUNERS, PRECISIONS, RANKS, size=5, allowed=has_tuner, once=True, parts=1),
)
def test_states_are_within_one_percent_of_what_deepspeed_allocates(
    cells: list[Any], tmp_path: Path
) -> None:
    wrong = find_wrong(cells, tmp_path)
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.process
@pytest.mark.parametrize(
    "places", [[(2, "optimizer_cpu")], pytest.param(PLACES, marks=pytest.mark.slow)], ids=len
)
@pytest.mark.slow
def test_so_are_those_of_an_optimizer_with_one_state(
    places: list[tuple[int, str]], tmp_path: Path
) -> None:
    cells = [
        (place, "full", ("bf16", "fp32")[index % 2], 2 - index % 3 // 2)
        for index, place in enumerate(places)
    ]
    wrong = find_wrong(cells, tmp_path, "optim=lion")
    assert not wrong, "\n".join(map(str, wrong))


#: Those of :data:`PLACES` that an optimizer with bf16 master weights claims.
LOW_PRECISION = [place for place in PLACES if place[0] > 0 and "nvme" not in place[1]]


@pytest.mark.process
@pytest.mark.parametrize(
    ("optimizer", "cells"),
    [
        ("adamw_bf16", [((3, "none"), "full", "bf16", 2)]),
        ("adamw_8bit", [((3, "none"), "full", "bf16", 2)]),
        *(
            pytest.param(
                kind,
                [(place, "full", "bf16", ranks) for place in LOW_PRECISION for ranks in RANKS],
                marks=pytest.mark.slow,
            )
            for kind in ("adamw_bf16", "adamw_8bit", "adamw_bf16 optim.rounding=kahan")
        ),
    ],
)
def test_so_are_those_of_low_precision_states(
    optimizer: str, cells: list[Any], tmp_path: Path
) -> None:
    wrong = find_wrong(cells, tmp_path, *f"optim={optimizer}".split())
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.process
@pytest.mark.parametrize(
    "places",
    [
        [(3, "none")],
        pytest.param([place for place in PLACES if "nvme" not in place[1]], marks=pytest.mark.slow),
    ],
    ids=len,
)
@pytest.mark.slow
def test_so_are_those_of_an_optimizer_with_a_rule_for_matrices(
    places: list[tuple[int, str]], tmp_path: Path
) -> None:
    cells = [
        (place, ("full", "lora")[index % 3 // 2], ("bf16", "fp32")[index % 2], 2 - index % 3 // 2)
        for index, place in enumerate(places)
    ]
    wrong = find_wrong(cells, tmp_path, "optim=muon")
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.process
@pytest.mark.parametrize(
    "cells",
    [
        [((0, "none"), "full", "bf16", 1)],
        pytest.param(
            [
                ((0, "none"), tuner, precision, ranks)
                for tuner in TUNERS
                for precision in PRECISIONS
                for ranks in RANKS
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=len,
)
def test_so_are_those_of_rows_and_columns(cells: list[Any], tmp_path: Path) -> None:
    wrong = find_wrong(cells, tmp_path, "optim=adafactor")
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.process
@pytest.mark.slow
def test_so_are_those_of_groups_with_settings_of_their_own(tmp_path: Path) -> None:
    cells = [
        ((3, "none"), "full", "bf16", 2),
        ((3, "nvme"), "full", "bf16", 2),
        ((1, "none"), "lora", "fp32", 1),
    ]
    groups = "optim.param_groups=[{pattern: 'layers\\.0\\.|embed', learning_rate: 1e-5}]"
    wrong = find_wrong(cells, tmp_path, groups)
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.process
@pytest.mark.slow
def test_so_are_those_of_a_model_whose_head_is_tied(tmp_path: Path) -> None:
    """Its head is written to NVMe before it gets the embedding's weight."""
    cells = [
        ((3, rung), tuner, "bf16", ranks)
        for rung in ("cpu", "nvme")
        for tuner in TUNERS
        for ranks in RANKS
    ]
    tied = [text for text in MODEL if not text.startswith("model.config.tie")]
    wrong = find_wrong(cells, tmp_path, model=tied)
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.process
@pytest.mark.slow
def test_so_are_those_of_a_model_whose_tables_have_grown(tmp_path: Path) -> None:
    """By so many rows that the plan of the model without them is more than one percent off.

    The tokenizer of the model has 512 tokens.
    """
    cells = [((3, "none"), "full", "bf16", 2), ((2, "none"), "lora", "bf16", 2)]
    tokens = ",".join(f"'<|{number}|>'" for number in range(200))
    grown = ["model.config.vocab_size=512", f"tuner.new_tokens=[{tokens}]"]
    wrong = find_wrong(cells, tmp_path, *grown)
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 1])
def test_so_are_those_of_a_model_of_which_a_part_is_frozen(part: int, tmp_path: Path) -> None:
    """Embeddings and head are frozen; two ranks share the layers without cutting a matrix."""
    cells = [
        (place, "freeze", ("bf16", "fp32")[index % 2], 2 - index % 3 // 2)
        for index, place in enumerate(PLACES)
        if has_tuner(place, "freeze")
    ][part::2]
    wrong = find_wrong(cells, tmp_path, "tuner.freeze.last_layers=2")
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.process
@pytest.mark.parametrize(
    ("overrides", "cells"),
    [
        ([], [((3, "none"), "qlora", "bf16", 2), ((2, "none"), "qlora", "bf16", 2)]),
        *(
            pytest.param(
                [f"tuner.bnb_4bit_use_double_quant={double_quant}"],
                [
                    (place, "qlora", precision, ranks)
                    for place in PLACES
                    for precision in PRECISIONS
                    for ranks in RANKS
                    if has_tuner(place, "qlora")
                ],
                marks=pytest.mark.slow,
            )
            for double_quant in (True, False)
        ),
    ],
)
def test_so_are_those_of_weights_in_4_bits(
    overrides: list[str], cells: list[Any], tmp_path: Path
) -> None:
    """And the bytes of their numbers and scales alone, on every rank."""
    wrong = find_wrong(cells, tmp_path, *overrides)
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.process
@pytest.mark.parametrize(
    "places",
    [
        [(3, "none")],
        pytest.param(
            [place for place in PLACES if has_tuner(place, "dora")], marks=pytest.mark.slow
        ),
    ],
    ids=len,
)
def test_so_are_those_of_dora(places: list[tuple[int, str]], tmp_path: Path) -> None:
    cells = [(place, "dora", "bf16", ranks) for place in places for ranks in (2, 1)[: len(places)]]
    wrong = find_wrong(cells, tmp_path)
    assert not wrong, "\n".join(map(str, wrong))


#: ZeRO 3's rungs that an optimizer claims.
RUNGS = ("none", "optimizer_cpu", "cpu", "optimizer_nvme", "nvme")
CLAIMED = {
    "adamw": RUNGS,
    "adamw_bf16": RUNGS[:3],
    "adamw_bf16 optim.rounding=kahan": RUNGS[:3],
    "adamw_8bit": RUNGS[:3],
    "adamw_paged_8bit": RUNGS[:3],
    "muon": RUNGS[:3],
}


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", CLAIMED)
def test_so_are_those_of_a_real_model(optimizer: str, tmp_path: Path) -> None:
    """SmolLM2-135M on two ranks, on every rung that the optimizer claims."""
    cells = [((3, rung), "full", "bf16", 2) for rung in CLAIMED[optimizer]]
    wrong = find_wrong(cells, tmp_path, *f"optim={optimizer}".split(), model=SMOLLM2)
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.process
@pytest.mark.slow
def test_so_are_those_of_rows_and_columns_of_a_real_model(tmp_path: Path) -> None:
    cells = [((0, "none"), "full", "bf16", 2)]
    wrong = find_wrong(cells, tmp_path, "optim=adafactor", model=SMOLLM2)
    assert not wrong, "\n".join(map(str, wrong))


def find_wrong(
    cells: list[Any], tmp_path: Path, *overrides: str, model: Sequence[str] = MODEL
) -> list[Any]:
    """Every number of bytes that is planned more than one percent off, and of parameters that is
    not the engine's.
    """
    wrong = []
    for ranks in RANKS:
        of_ranks = [cell for cell in cells if cell[3] == ranks]
        tasks = [
            {
                "overrides": [*model, f"tuner={tuner}", *overrides, f"precision={precision}"],
                "stage": stage,
                "rung": rung,
                "accumulation": 2 // ranks,
            }
            for (stage, rung), tuner, precision, _ in of_ranks
        ]
        found = (
            train_engines(tasks, ranks, tmp_path, timeout=900, module="tests.engine.measure")
            if tasks
            else []
        )
        for cell, result in zip(of_ranks, found, strict=True):
            predicted, measured = result["predicted"], result["measured"]
            allowed = {"memory": 0.01, "nvme": 0.01, "trained": 0.0, "nf4": 0.01}
            for kind, share in allowed.items():
                if abs(predicted[kind] - measured[kind]) > share * max(measured[kind], 1):
                    wrong.append(
                        (cell, kind, predicted[kind], measured[kind], result["categories"])
                    )
    return wrong
