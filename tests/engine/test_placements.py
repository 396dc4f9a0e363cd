"""Where ZeRO keeps its states changes nothing: every rung of the ladder gives the same loss curve
and reads what others wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import largest_difference, train_engines

RUNGS = ("none", "optimizer_cpu", "cpu", "optimizer_nvme", "nvme")

#: Hidden 1088 on two ranks: between 1-D tensors the slices lie off the sectors of a disk, and
#: DeepSpeed trains wrong.
WIDE = [
    "model=tiny",
    "model.config.hidden_size=1088",
    "model.config.intermediate_size=2176",
    "precision=bf16",
    "model.config.num_attention_heads=17",
    "model.config.num_key_value_heads=17",
    "model.config.head_dim=64",
    "data.train=stdlib_docs@200",
    "data.max_seq_length=256",
    "data.overlong=truncate",
    "train.global_batch_size=2",
]


def on(rung: str, base: list[str], folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "overrides": [*base, "zero=3", f"offload={rung}", f"offload.nvme_path={folder}/nvme"],
        **more,
    }


@dataclass(frozen=True, kw_only=True)
class Runs:
    """One job of full fine-tuning on every rung, with a checkpoint of step 2."""

    job: list[str]
    steps: int
    folder: Path
    losses: dict[str, list[float]]

    def checkpoint(self, rung: str) -> str:
        return str(self.folder / rung / "checkpoint-2")


#: Steps and overrides: what the ordinary suite has time for, and a longer run.
LENGTHS = [
    pytest.param((4, ["optim.learning_rate=2e-4", "model.config.num_hidden_layers=1"]), id="short"),
    pytest.param(
        (10, ["optim.learning_rate=5e-5", "train.global_batch_size=4"]),
        id="long",
        marks=pytest.mark.slow,
    ),
]


@pytest.fixture(scope="module", params=LENGTHS)
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, nursery: None
) -> Runs:
    steps, more = request.param
    found = Runs(
        job=[*WIDE, *more, "tuner=full"],
        steps=steps,
        folder=tmp_path_factory.mktemp("runs"),
        losses={},
    )
    tasks = [
        on(
            rung,
            found.job,
            found.folder,
            first=0,
            last=steps,
            save=found.checkpoint(rung),
            save_at=2,
        )
        for rung in RUNGS
    ]
    results = train_engines(tasks, 2, found.folder)
    found.losses.update(
        {rung: result["losses"] for rung, result in zip(RUNGS, results, strict=True)}
    )
    return found


@pytest.mark.process
def test_every_rung_gives_the_same_curve(runs: Runs) -> None:
    """``scripts/bench/placements.py`` does the same with SmolLM2-135M; see docs/planner.md."""
    reference = runs.losses["none"]
    assert reference[-1] < reference[0] - 0.02, "the model must learn"
    for rung, losses in runs.losses.items():
        assert largest_difference(losses, reference) < 1e-3, (rung, losses, reference)


@pytest.mark.process
@pytest.mark.slow
def test_a_run_goes_on_exactly_on_nvme_and_from_it(runs: Runs, tmp_path: Path) -> None:
    """NVMe to NVMe to the last digit; to and from other placements as closely as they agree with
    each other.
    """

    def resumed(source: str, target: str) -> dict[str, Any]:
        return on(
            target, runs.job, tmp_path, first=2, last=runs.steps, load=runs.checkpoint(source)
        )

    rest = {rung: losses[2:] for rung, losses in runs.losses.items()}
    pairs = [
        ("optimizer_nvme", "optimizer_nvme"),
        ("nvme", "nvme"),
        ("none", "nvme"),
        ("nvme", "none"),
    ]
    loaded = train_engines([resumed(*pair) for pair in pairs], 2, tmp_path)
    alone = train_engines([resumed("optimizer_nvme", "nvme")], 1, tmp_path)
    for (source, target), result in zip(pairs, loaded, strict=True):
        if source == target:
            assert result["losses"] == rest[source], (source, result["losses"])
        assert largest_difference(result["losses"], rest["none"]) < 1e-3, (source, target)
    assert largest_difference(alone[0]["losses"], rest["none"]) < 2e-3


@pytest.mark.process
@pytest.mark.slow
def test_lora_gives_the_same_curve_with_its_weights_on_nvme(tmp_path: Path) -> None:
    run = [*WIDE, "tuner=lora", "optim.learning_rate=2e-3"]
    found = train_engines(
        [on(rung, run, tmp_path, first=0, last=4) for rung in ("none", "nvme")], 2, tmp_path
    )
    assert largest_difference(found[1]["losses"], found[0]["losses"]) < 1e-3
    assert found[0]["losses"][-1] < found[0]["losses"][0] - 0.02
