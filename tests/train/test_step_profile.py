"""``debug=profile``: which steps are traced, and that the trace and its summary are there."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmtune.config.compose import compose_config
from llmtune.config.groups.profile import MOST_STEPS, ProfileConfig
from llmtune.engine.distributed import Rank
from llmtune.engine.phases.phase_clock import REST
from llmtune.errors import ConfigError
from llmtune.storage import layout
from llmtune.track.console import Console
from llmtune.track.profiling.trace import DATA, MATMUL, OPTIMIZER, read_events
from llmtune.train.hooks.step_profile import StepProfile
from llmtune.train.training_state import TrainingState
from tests.support import TINY, run_cli


def profile_of(
    run: Path, total_steps: int, out: io.StringIO, rank: int = 0, **config: int
) -> StepProfile:
    request: Any = SimpleNamespace(run_folder=run, steps=SimpleNamespace(total_steps=total_steps))
    place = Rank(rank=rank, local_rank=0, world_size=2, device=torch.device("cpu"))
    return StepProfile(ProfileConfig(**config), request, place, Console(out))


def train(profile: StepProfile, first: int, last: int) -> None:
    """Steps of which nearly all is a product, and the rest the optimizer's."""
    profile.on_start(TrainingState(step=first - 1))
    phases = profile._rank.phases
    matrix = torch.randn(400, 400)
    for step in range(first, last + 1):
        with profile.step(step):
            phases.enter("data")
            phases.enter("forward")
            for _ in range(10):
                matrix @ matrix
            phases.enter("step")
            matrix.add_(0.0)
            phases.clock.enter(REST)
    profile.on_end(TrainingState(step=last))


def traced_steps(file: Path) -> list[str]:
    names = [event["name"] for event in read_events(file)]
    return sorted(name for name in names if name.startswith("llmtune: step "))


def test_the_steps_after_the_warm_up_are_traced_and_summed_up(tmp_path: Path) -> None:
    out = io.StringIO()
    profile = profile_of(tmp_path, 100, out, steps=2, warmup_steps=3)
    train(profile, 1, 7)
    file = layout.trace_file(tmp_path, 0)
    assert traced_steps(file) == ["llmtune: step 4", "llmtune: step 5"]
    shares = profile._shares
    assert shares is not None
    assert shares.steps == 2
    assert shares.categories[MATMUL] > 0.5 * shares.seconds
    assert {OPTIMIZER, DATA} <= set(shares.categories)
    assert sum(shares.categories.values()) == pytest.approx(shares.seconds, rel=0.01)
    assert shares.operators[0][0] == "aten::mm"
    page = (tmp_path / layout.PROFILE_SUMMARY).read_text()
    assert "Mean of 2 traced steps on the processor of rank 0" in page
    assert "| `aten::mm` | matrix products |" in page
    assert f"profile: 2 steps traced: {file}" in out.getvalue()
    assert "where the time of a step went (2 traced steps)" in out.getvalue()
    assert profile._rank.phases.clock.listener is None


def test_other_ranks_write_their_trace_and_no_summary(tmp_path: Path) -> None:
    out = io.StringIO()
    train(profile_of(tmp_path, 9, out, rank=1, steps=1, warmup_steps=1), 1, 4)
    assert traced_steps(layout.trace_file(tmp_path, 1)) == ["llmtune: step 2"]
    assert not (tmp_path / layout.PROFILE_SUMMARY).exists()
    assert out.getvalue() == ""


@pytest.mark.parametrize(
    ("done", "total", "traced", "says"),
    [
        (0, 100, range(4, 7), False),
        # A resumed run: its own steps count.
        (50, 100, range(54, 57), False),
        (0, 6, range(4, 7), False),
        (0, 5, range(3, 6), True),
        (97, 100, range(99, 101), True),
        (0, 2, range(2, 3), True),
        (9, 10, range(10, 11), True),
        (10, 10, range(0), False),
    ],
)
def test_a_start_with_few_steps_left_says_what_it_traces(
    done: int, total: int, traced: range, says: bool, tmp_path: Path
) -> None:
    out = io.StringIO()
    profile = profile_of(tmp_path, total, out, steps=3, warmup_steps=3)
    profile.on_start(TrainingState(step=done))
    assert list(profile._traced) == list(traced)
    assert ("instead of profile.steps=3" in out.getvalue()) is says


def test_a_run_that_ends_early_keeps_the_steps_that_it_has(tmp_path: Path) -> None:
    out = io.StringIO()
    profile = profile_of(tmp_path, 100, out, steps=5, warmup_steps=1)
    train(profile, 1, 3)
    file = layout.trace_file(tmp_path, 0)
    assert traced_steps(file) == ["llmtune: step 2", "llmtune: step 3"]
    assert profile._shares is not None
    assert profile._shares.steps == 2


def test_without_it_nothing_is_traced(tmp_path: Path) -> None:
    out = io.StringIO()
    train(profile_of(tmp_path, 100, out), 1, 9)
    assert list(tmp_path.iterdir()) == []
    assert out.getvalue() == ""


def test_a_disk_that_refuses_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / layout.PROFILE).write_text("a file in the place of the folder")
    out = io.StringIO()
    train(profile_of(tmp_path, 100, out, steps=1, warmup_steps=1), 1, 4)
    assert "is not written" in out.getvalue()


def test_the_overlay_asks_for_it_and_too_much_is_refused() -> None:
    config = compose_config(["model=tiny", "data.train=a.jsonl", "debug=profile"]).config
    assert config.profile == ProfileConfig(steps=3)
    with pytest.raises(ConfigError, match=f"profile.steps=21: at most {MOST_STEPS}"):
        compose_config(["model=tiny", "data.train=a.jsonl", "profile.steps=21"])
    with pytest.raises(ConfigError, match="profile.warmup_steps=-1: must not be negative"):
        compose_config(["model=tiny", "data.train=a.jsonl", "profile.warmup_steps=-1"])


@pytest.mark.slow
@pytest.mark.process
def test_a_run_with_it_trains_as_without(tmp_path: Path) -> None:
    job = [
        *(*TINY, "data.train=stdlib_docs@50", "data.val_set_size=4", "train.global_batch_size=2"),
        *("train.max_steps=3", "train.gradient_accumulation_steps=2", "export=none"),
    ]
    losses = []
    for name, more in {
        "plain": [],
        "traced": ["debug=profile", "profile.steps=1", "profile.warmup_steps=1"],
    }.items():
        folder = tmp_path / name
        done = run_cli(*job, *more, f"output_dir={folder}")
        assert done.code == 0, done.out + done.err
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses.append([record["loss"] for record in records if "loss" in record])
    assert losses[0] == losses[1]
    assert "where the time of a step went (1 traced step)" in done.out
    events = read_events(layout.trace_file(folder, 0))
    assert traced_steps(layout.trace_file(folder, 0)) == ["llmtune: step 2"]
    # Two micro-batches, each with both passes.
    names = [event["name"] for event in events]
    assert (names.count("llmtune: forward"), names.count("llmtune: backward")) == (2, 2)
    assert "| part | time | share |" in (folder / layout.PROFILE_SUMMARY).read_text()
