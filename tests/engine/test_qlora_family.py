"""The kinds of LoRA on a base in 4 bits: the curves of bitsandbytes and peft in plain PyTorch, and
resumes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.qlora_reference import train_plainly
from tests.support import first, largest_difference, train_engines

STEPS = 10
HALF = 5
BASE = [
    *("model=tiny", "data.train=stdlib_docs@200", "data.max_seq_length=256", "tuner=qlora"),
    *("data.overlong=truncate", "optim.learning_rate=2e-3", "precision=fp32", "offload=none"),
    *("tuner.lora_r=8", "tuner.lora_alpha=16"),
]
KINDS: dict[str, list[str]] = {
    "dora": ["tuner.use_dora=true"],
    "loftq": ["tuner.init_lora_weights=loftq"],
    "pissa": ["tuner.init_lora_weights=pissa"],
    "olora": ["tuner.init_lora_weights=olora", "tuner.use_rslora=true"],
    "lora_plus": ["tuner.lora_plus_ratio=4", "tuner.use_rslora=true"],
    "pissa with dora": ["tuner.init_lora_weights=pissa", "tuner.use_dora=true"],
}
PLACES = [(stage, ranks) for stage in (0, 2, 3) for ranks in (1, 2)]
CHOSEN = {2: [("dora", 3), ("loftq", 3)], 1: [("pissa", 3), ("pissa with dora", 0)]}
CELLS = [(kind, place) for kind in KINDS for place in PLACES]


def check(cells: list[tuple[str, int]], ranks: int, cache: Path, folder: Path) -> None:
    """Train each kind whole, and in two halves with a checkpoint between them."""
    tasks: list[dict[str, Any]] = []
    for number, (kind, stage) in enumerate(cells):
        overrides = [*BASE, *KINDS[kind], f"zero={stage}"]
        saved = str(folder / str(number) / f"checkpoint-{HALF}")
        whole = {"overrides": overrides, "first": 0, "last": STEPS, "save": saved, "save_at": HALF}
        tasks += [whole, {"overrides": overrides, "first": HALF, "last": STEPS, "load": saved}]
    found = train_engines(tasks, ranks, folder, timeout=600)
    for (kind, stage), whole, rest in zip(cells, found[::2], found[1::2], strict=True):
        overrides = [*BASE, *KINDS[kind]]
        reference = train_plainly(overrides, STEPS, cache)
        assert reference[-1] < reference[0] - 0.05, "the model must learn"
        assert largest_difference(whole["losses"], reference) < 1e-4, (kind, stage)
        assert rest["losses"] == whole["losses"][HALF:], (kind, stage)
        assert rest["norms"] == whole["norms"][HALF:], (kind, stage)


@pytest.mark.process
@pytest.mark.parametrize("ranks", first(1, [2, 1]))
def test_kinds_have_the_curve_of_bitsandbytes_and_peft(
    ranks: int, cache: Path, tmp_path: Path
) -> None:
    check(CHOSEN[ranks], ranks, cache, tmp_path)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_other_kinds_and_stages_do_too(ranks: int, cache: Path, tmp_path: Path) -> None:
    cells = [(kind, stage) for kind, (stage, of) in CELLS if of == ranks]
    check([cell for cell in cells if cell not in CHOSEN[ranks]], ranks, cache, tmp_path)
