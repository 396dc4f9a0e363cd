"""Where ZeRO keeps its states changes nothing: every rung of the ladder gives the same loss curve and reads what others wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import largest_difference, train_engines

RUNGS = ("none", "optimizer_cpu", "cpu", "optimizer_nvme", "nvme")

#: Hidden 1088 on two ranks: between 1-D tensors the slices lie off the sectors of a disk, and DeepSpeed trains wrong.
WIDE = [
    *("model=tiny", "model.config.hidden_size=1088", "model.config.intermediate_size=2176", "precision=bf16"),
    *("model.config.num_attention_heads=17", "model.config.num_key_value_heads=17", "model.config.head_dim=64"),
    *("data.train=stdlib_docs@200", "data.max_seq_length=256", "data.overlong=truncate", "train.global_batch_size=2"),
]


def on(rung: str, base: list[str], folder: Path, **more: Any) -> dict[str, Any]:
    return {"overrides": [*base, "zero=3", f"offload={rung}", f"offload.nvme_path={folder}/nvme"], **more}


#: Steps, learning rate of full fine-tuning, and overrides: what the ordinary suite has time for, and a longer run.
LENGTHS = [
    pytest.param(3, "optim.learning_rate=2e-4", ["train.global_batch_size=2"], id="short"),
    pytest.param(10, "optim.learning_rate=5e-5", ["train.global_batch_size=4"], id="long", marks=pytest.mark.slow),
]


@pytest.mark.process
@pytest.mark.parametrize(("steps", "rate", "more"), LENGTHS)
def test_every_rung_gives_the_same_curve(steps: int, rate: str, more: list[str], tmp_path: Path) -> None:
    """``scripts/bench/placements.py`` does the same with SmolLM2-135M; see docs/planner.md."""
    run = [*WIDE, *more, "tuner=full", rate]
    found = train_engines([on(rung, run, tmp_path, first=0, last=steps) for rung in RUNGS], 2, tmp_path)
    reference = found[0]["losses"]
    assert reference[-1] < reference[0] - 0.02, "the model must learn"
    for rung, result in zip(RUNGS, found, strict=True):
        assert largest_difference(result["losses"], reference) < 1e-3, (rung, result["losses"], reference)


@pytest.mark.process
def test_lora_gives_the_same_curve_with_its_weights_on_nvme(tmp_path: Path) -> None:
    run = [*WIDE, "tuner=lora", "optim.learning_rate=2e-3"]
    found = train_engines([on(rung, run, tmp_path, first=0, last=4) for rung in ("none", "cpu", "nvme")], 2, tmp_path)
    for result in found[1:]:
        assert largest_difference(result["losses"], found[0]["losses"]) < 1e-3
    assert found[0]["losses"][-1] < found[0]["losses"][0] - 0.02


@pytest.mark.process
@pytest.mark.parametrize(
    ("last", "rate", "more"),
    [
        pytest.param(4, "optim.learning_rate=2e-4", ["model.config.num_hidden_layers=1"], id="short"),
        pytest.param(5, *LENGTHS[1].values[1:], id="long", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_exactly_on_nvme_and_from_it(last: int, rate: str, more: list[str], tmp_path: Path) -> None:
    """NVMe to NVMe to the last digit; to and from other placements as closely as they agree with each other."""
    run = [*WIDE, *more, "tuner=full", rate]
    rungs = ("none", "optimizer_nvme", "nvme")
    folders = {rung: str(tmp_path / rung / "checkpoint-2") for rung in rungs}
    straight = train_engines(
        [on(r, run, tmp_path, first=0, last=last, save=folders[r], save_at=2) for r in rungs], 2, tmp_path
    )
    pairs = [("optimizer_nvme", "optimizer_nvme"), ("nvme", "nvme"), ("none", "nvme"), ("nvme", "none")]
    loaded = train_engines([on(b, run, tmp_path, first=2, last=last, load=folders[a]) for a, b in pairs], 2, tmp_path)
    alone = train_engines([on("nvme", run, tmp_path, first=2, last=last, load=folders["optimizer_nvme"])], 1, tmp_path)
    curve = dict(zip(rungs, (result["losses"][2:] for result in straight), strict=True))
    for (source, target), result in zip(pairs, loaded, strict=True):
        if source == target:
            assert result["losses"] == curve[source], (source, result["losses"])
        assert largest_difference(result["losses"], curve["none"]) < 1e-3, (source, target)
    assert largest_difference(alone[0]["losses"], curve["none"]) < 2e-3
