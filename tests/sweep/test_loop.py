"""The loop of a sweep with a runner that trains nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from llmtune.errors import DataError, LlmtuneError, StoppedError
from llmtune.launch.supervise.signals import StopRequests
from llmtune.sweep.space import Parameter
from llmtune.sweep.trial import Trial, TrialEnd, TrialState
from tests.sweep.fakes import STEPS, FakeRunner, loss_of, make_loop, make_study

FAILED = TrialState.failed


def failing(*reasons: str | None, code: int = 1) -> FakeRunner:
    """A runner whose trials fail for these reasons, in their order; None is a success."""

    def end(trial: Trial) -> TrialEnd | None:
        reason = reasons[trial.number] if trial.number < len(reasons) else None
        return TrialEnd(state=FAILED, reason=reason, exit_code=code) if reason else None

    return FakeRunner(end)


def test_a_sweep_has_as_many_trials_as_it_should(tmp_path: Path) -> None:
    study, said = make_study(tmp_path), list[str]()
    refreshed: list[int] = []
    make_loop(study, FakeRunner(), 8, said).run(lambda: refreshed.append(1))
    trials = study.list_trials()
    assert [trial.number for trial in trials] == list(range(8))
    assert {trial.state for trial in trials} == {TrialState.finished, TrialState.pruned}
    assert len(refreshed) == 8
    for trial in trials:
        is_whole = trial.state is TrialState.finished
        assert is_whole is (tuple(trial.evaluations) == STEPS)
        if is_whole:
            assert trial.value == loss_of(trial, STEPS[-1])
    assert said[0].startswith("trial 0 (1 of 8): optim.learning_rate=")
    # Nothing is left to do, and more can be asked for.
    runner = FakeRunner()
    make_loop(make_study(tmp_path), runner, 8).run()
    assert runner.ran == []
    make_loop(make_study(tmp_path), runner, 10).run()
    assert [trial.number for trial in runner.ran] == [8, 9]


def test_a_failed_trial_is_recorded_and_is_never_good(tmp_path: Path) -> None:
    study, said = make_study(tmp_path), list[str]()
    make_loop(study, failing("first", None, "third", code=4), 4, said).run()
    states = [trial.state for trial in study.list_trials()]
    assert states.count(FAILED) == 2
    assert [trial.reason for trial in study.list_trials()] == ["first", "", "third", ""]
    assert study.best() not in [trial for trial in study.list_trials() if trial.state is FAILED]
    assert "trial 2 failed: third" in said


def test_the_same_error_three_times_in_a_row_ends_the_sweep(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    reasons = [
        f"{folder}/trial-{n}: rows.jsonl is gone at step {n}" for n, folder in enumerate("aaa")
    ]
    with pytest.raises(DataError, match="3 trials in a row failed with the same error") as caught:
        make_loop(study, failing(None, *reasons, code=4), 9).run()
    assert reasons[-1] in str(caught.value)
    assert len(study.list_trials()) == 4
    # The next start tries on: what was wrong may have been corrected.
    make_loop(make_study(tmp_path), FakeRunner(), 5).run()
    assert len(study.list_trials()) == 5


@pytest.mark.parametrize(
    "reasons", [("a", "b", "a", "b"), ("a", "a", None, "a", "a"), ("a", "a", "b", "a", "a")]
)
def test_other_errors_do_not_end_it(reasons: tuple[str | None, ...], tmp_path: Path) -> None:
    study = make_study(tmp_path, prunes=False)
    make_loop(study, failing(*reasons), 6).run()
    assert len(study.list_trials()) == 6


def test_an_unknown_code_ends_it_as_an_unexpected_error(tmp_path: Path) -> None:
    with pytest.raises(LlmtuneError) as caught:
        make_loop(make_study(tmp_path), failing("x", "x", "x"), 9).run()
    assert caught.value.exit_code == 1


def test_what_does_not_fit_is_failed_and_counts_for_no_row_of_errors(tmp_path: Path) -> None:
    def end(trial: Trial) -> TrialEnd | None:
        misfit = TrialEnd(state=FAILED, reason="too large", exit_code=3, does_not_fit=True)
        return misfit if trial.number < 4 else None

    study, said = make_study(tmp_path), list[str]()
    make_loop(study, FakeRunner(end), 6, said).run()
    assert [trial.state for trial in study.list_trials()[:4]] == [FAILED] * 4
    assert "trial 1 is not started: too large" in said
    assert study.best() in study.list_trials()[4:]


def test_a_signal_ends_it_and_the_trial_goes_on(tmp_path: Path) -> None:
    stops = StopRequests()

    def stop(trial: Trial) -> TrialEnd | None:
        if trial.number < 2:
            return None
        stops.received.append(signal.SIGTERM)
        return TrialEnd(state=TrialState.unfinished)

    study = make_study(tmp_path)
    with pytest.raises(StoppedError, match="this command goes on: python -m llmtune sweep"):
        make_loop(study, FakeRunner(stop), 4, stops=stops).run()
    (stopped,) = [t for t in study.list_trials() if t.state is TrialState.unfinished]
    said: list[str] = []
    runner = FakeRunner()
    make_loop(make_study(tmp_path), runner, 4, said).run()
    assert [trial.number for trial in runner.ran] == [2, 3]
    assert runner.ran[0].values == stopped.values
    assert said[0].startswith("trial 2 goes on: optim.learning_rate=")


def test_a_signal_between_trials_begins_no_other(tmp_path: Path) -> None:
    stops = StopRequests()

    def stop(_: Trial) -> None:
        stops.received.append(signal.SIGINT)

    study = make_study(tmp_path)
    with pytest.raises(StoppedError):
        make_loop(study, FakeRunner(stop), 4, stops=stops).run()
    assert [trial.state for trial in study.list_trials()] == [TrialState.finished]


def test_time_and_space_end_it(tmp_path: Path) -> None:
    said: list[str] = []
    study = make_study(tmp_path)
    make_loop(study, FakeRunner(), 4, said, seconds=0.0).run()
    assert study.list_trials() == []
    assert said[-1].startswith("hparams_search.timeout is over after 0 trials of 4")
    (tmp_path / "small").mkdir()
    small = make_study(tmp_path / "small", [Parameter(key="tuner.lora_r", choices=(8, 16))])
    done = TrialEnd(state=TrialState.finished, value=1.0)
    make_loop(small, FakeRunner(lambda _: done), 9, said).run()
    assert len(small.list_trials()) == 2
    assert said[-1] == "all 2 settings of hparams_search.space have been tried"
