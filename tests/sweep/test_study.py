"""The stored trials: their settings, their file, and what is told of them."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median

import optuna
import pytest

from llmtune.config.groups.verbs.hparams_search import Sampler
from llmtune.errors import CheckpointError
from llmtune.sweep.space import Parameter, list_points
from llmtune.sweep.study import Study
from llmtune.sweep.trial import Trial, TrialState
from tests.sweep.fakes import SPACE, loss_of, make_study

SMALL = [
    Parameter(key="tuner.lora_r", choices=(8, 16)),
    Parameter(key="schedule.warmup_steps", low=1, high=3, step=1),
    Parameter(key="train.num_train_epochs", low=1.0, high=2.0, step=0.5),
]


def begin(study: Study) -> Trial:
    trial = study.begin()
    assert trial is not None
    return trial


@pytest.mark.parametrize("sampler", Sampler)
def test_a_space_is_tried_once_and_then_over(sampler: Sampler, tmp_path: Path) -> None:
    study = make_study(tmp_path, SMALL, sampler=sampler)
    found = []
    while (trial := study.begin()) is not None:
        found.append(trial.values)
        study.finish(trial, float(trial.number))
    points = list(list_points(SMALL))
    assert len(found) == len(points) == 18
    assert sorted(map(str, found)) == sorted(map(str, points))
    if sampler is Sampler.grid:
        assert found == points


@pytest.mark.parametrize("sampler", [Sampler.tpe, Sampler.random])
def test_settings_are_within_the_space_and_follow_from_the_seed(
    sampler: Sampler, tmp_path: Path
) -> None:
    runs = []
    for name in "ab":
        (tmp_path / name).mkdir()
        values = []
        for number in range(14):
            # Opened anew each time, as after a kill.
            study = make_study(tmp_path / name, sampler=sampler)
            trial = begin(study)
            assert trial.number == number
            values.append(trial.values)
            study.finish(trial, loss_of(trial, 6))
        runs.append(values)
    assert runs[0] == runs[1]
    assert len({str(values) for values in runs[0]}) == 14
    for tried in runs[0]:
        rate, steps = tried["optim.learning_rate"], tried["schedule.warmup_steps"]
        assert isinstance(rate, float)
        assert 1e-5 <= rate <= 1e-2
        assert tried["tuner.lora_r"] in (8, 16, 32)
        assert isinstance(steps, int)
        assert 0 <= steps <= 10


def test_tpe_goes_where_it_is_good(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    for _ in range(30):
        trial = begin(study)
        study.finish(trial, loss_of(trial, 6))
    values = [trial.value or 9 for trial in study.list_trials()]
    assert median(values[15:]) < median(values[:10])
    best = study.best()
    assert best is not None
    assert best.value == min(trial.value or 9 for trial in study.list_trials())
    shares = study.importance()
    assert next(iter(shares)) == "optim.learning_rate"
    assert sum(shares.values()) == pytest.approx(1)


def test_a_trial_keeps_what_it_is_told(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    first = begin(study)
    assert study.find_unfinished() == first
    study.judge(first, 2, 3.0)
    study.judge(first, 4, 2.0)
    study.finish(first, 2.0)
    second = begin(study)
    study.fail(second, "it failed")
    third = begin(study)
    study.judge(third, 2, 4.0)
    study.prune(third)
    again = make_study(tmp_path)
    one, two, three = again.list_trials()
    assert (one.state, one.value, one.evaluations) == (TrialState.finished, 2.0, {2: 3.0, 4: 2.0})
    assert (two.state, two.value, two.reason) == (TrialState.failed, None, "it failed")
    assert (three.state, three.value) == (TrialState.pruned, 4.0)
    assert again.find_unfinished() is None
    assert again.best() == one
    assert again.importance() == {}


def test_a_trial_is_judged_by_the_median_of_the_others(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    for loss in (3.0, 2.0, 1.0):
        trial = begin(study)
        assert not study.judge(trial, 2, loss)
        study.finish(trial, loss)
    trial = begin(study)
    assert not study.judge(trial, 2, 1.5)
    assert not study.judge(trial, 4, 9.0), "nobody else was at that step"
    study.prune(trial)
    trial = begin(study)
    assert study.judge(trial, 2, 2.5)
    # It goes on from a checkpoint and does an evaluation again.
    assert study.judge(trial, 2, 2.5)
    study.prune(trial)
    trial = begin(study)
    assert study.judge(trial, 2, float("nan"))
    (tmp_path / "other").mkdir()
    without = make_study(tmp_path / "other", prunes=False)
    for loss in (1.0, 1.0, 1.0, 9.0):
        trial = begin(without)
        assert not without.judge(trial, 2, loss)
        without.finish(trial, loss)


def test_an_evaluation_before_the_newest_ends_nothing(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    for _ in range(3):
        trial = begin(study)
        study.judge(trial, 2, 1.0)
        study.judge(trial, 4, 1.0)
        study.finish(trial, 1.0)
    trial = begin(study)
    study.judge(trial, 2, 0.5)
    assert not study.judge(trial, 4, 5.0), "its best so far counts"
    assert not study.judge(trial, 2, 0.5)


@pytest.mark.parametrize("name", ["a b", "a?b=c", "a#b", "a%20b", "ä'\"", "a;b"])
def test_the_folder_may_have_any_name(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    begin(make_study(folder))
    assert (folder / "study.db").is_file()
    assert len(make_study(folder).list_trials()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_optuna_itself_reads_the_file(tmp_path: Path) -> None:
    study = make_study(tmp_path, maximize=True)
    study.finish(begin(study), 0.5)
    stored = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path}/study.db")
    assert stored.best_value == 0.5
    assert stored.direction is optuna.study.StudyDirection.MAXIMIZE
    assert stored.best_params.keys() == {parameter.key for parameter in SPACE}


@pytest.mark.parametrize("data", [b"", b"no database at all", b"SQLite format 3\0" + b"\xff" * 200])
def test_a_damaged_file_is_an_error_for_the_user(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(data)
    if not data:
        # What a crash leaves of a file that was just made.
        assert make_study(tmp_path).list_trials() == []
        return
    with pytest.raises(CheckpointError, match=r"study\.db of the sweep cannot be used"):
        make_study(tmp_path)


def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    make_study(tmp_path)
    os.chmod(tmp_path / "study.db", 0o666)  # noqa: PTH101
    with pytest.raises(CheckpointError, match="may be written by everybody"):
        make_study(tmp_path)
