"""Which trackers a configuration names, and what they are told about a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtune.config.compose import compose_config
from llmtune.config.groups.tracker import TrackerConfig
from llmtune.errors import MissingPrerequisiteError
from llmtune.track.service import (
    SERVICES,
    Service,
    check_packages,
    find_service_problems,
    resolve_services,
)
from tests.track.records import tracked_run

SECRET = "hunter2-and-more-4711"


def names(config: TrackerConfig) -> list[str]:
    return [service.name for service in resolve_services(config)]


@pytest.fixture
def absent() -> Iterator[None]:
    """A service whose package nobody has."""
    SERVICES.register(
        Service(
            name="absent",
            title="Absent",
            open=lambda _: pytest.fail("opened"),
            package="a_package_of_nobody",
            extra="absent",
        )
    )
    yield
    del SERVICES._variants["absent"]


@pytest.mark.parametrize(
    ("kind", "kinds", "chosen"),
    [
        ("none", [], []),
        ("wandb", [], ["wandb"]),
        ("none", ["wandb"], ["wandb"]),
        ("wandb", ["wandb"], ["wandb"]),
        ("wandb", ["absent", "wandb"], ["wandb", "absent"]),
        ("none", ["absent", "wandb", "absent"], ["absent", "wandb"]),
    ],
)
def test_a_kind_and_several_kinds_are_each_taken_once(
    absent: None, kind: str, kinds: list[str], chosen: list[str]
) -> None:
    assert names(TrackerConfig(kind=kind, kinds=kinds)) == chosen


def test_several_are_named_on_the_command_line() -> None:
    for overrides in (["tracker.kinds=[wandb]"], ["tracker=wandb"]):
        composed = compose_config([*overrides, "model=tiny", "data.train=a.jsonl"])
        assert names(composed.config.tracker) == ["wandb"]


def test_one_that_is_not_there_is_named_with_the_nearest() -> None:
    (problem,) = find_service_problems(TrackerConfig(kinds=["wandbb"]))
    assert "wandbb: there is no such one; did you mean wandb?" in problem
    (problem,) = find_service_problems(TrackerConfig(kinds=["none", "wandb"]))
    assert "none is no tracker; leave the list empty" in problem
    assert list(find_service_problems(TrackerConfig(kinds=["wandb"]))) == []


def test_a_missing_package_is_told_with_the_command_that_installs_it(absent: None) -> None:
    check_packages(TrackerConfig(kind="wandb"))
    with pytest.raises(MissingPrerequisiteError, match=r"pip install 'llmtune\[absent\]', or lea"):
        check_packages(TrackerConfig(kind="wandb", kinds=["absent"]))


def test_no_tracker_is_told_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    nest: dict[str, Any] = {"a": [{"b": f"https://me:{SECRET}@host"}], "c": SECRET}
    run = tracked_run(
        tmp_path,
        [],
        config=TrackerConfig(project=f"p-{SECRET}", entity=SECRET),
        name=f"run-{SECRET}",
        settings=nest,
        plan={"notes": (SECRET,)},
    )
    told = (run.config.project, run.config.entity, run.name, run.settings, run.plan)
    assert SECRET not in repr(told)
    assert repr(told).count("***SOME_TOKEN***") >= 5


def test_the_id_of_a_run_is_kept_and_a_sweeps_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    first = tracked_run(tmp_path, []).run_id
    assert first == tracked_run(tmp_path, []).run_id
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-agent")
    assert tracked_run(tmp_path, []).run_id == "of-the-agent"
