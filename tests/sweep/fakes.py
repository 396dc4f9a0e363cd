"""Sweeps without trainings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from llmtune.config.groups.verbs.hparams_search import HparamsSearchConfig, Sampler
from llmtune.launch.supervise.signals import StopRequests
from llmtune.sweep.loop import Limits, SweepLoop
from llmtune.sweep.objective import Objective
from llmtune.sweep.runner import Judge
from llmtune.sweep.space import Parameter
from llmtune.sweep.study import Study, open_study
from llmtune.sweep.trial import Trial, TrialEnd, TrialState

SPACE = [
    Parameter(key="optim.learning_rate", low=1e-5, high=1e-2, is_log=True),
    Parameter(key="tuner.lora_r", choices=(8, 16, 32)),
    Parameter(key="schedule.warmup_steps", low=0, high=10, step=1),
]
OBJECTIVE = Objective("eval_loss", maximize=False)
STEPS = (2, 4, 6)


def make_study(
    folder: Path,
    space: Sequence[Parameter] = tuple(SPACE),
    prunes: bool = True,
    sampler: Sampler = Sampler.tpe,
    maximize: bool = False,
) -> Study:
    search = HparamsSearchConfig(sampler=sampler, pruner_startup_trials=2)
    objective = Objective("eval_f1", True) if maximize else OBJECTIVE
    return open_study(folder, space, objective, search, prunes)


def loss_of(trial: Trial, step: int) -> float:
    """A loss that depends on the settings, and falls with the steps."""
    rate, rank = trial.values["optim.learning_rate"], trial.values["tuner.lora_r"]
    assert isinstance(rate, float)
    assert isinstance(rank, int)
    return 1.0 + abs(rate - 1e-3) * 300 + 1 / rank + 1 / step


class FakeRunner:
    """Evaluates a few times, and ends as it is told to."""

    def __init__(self, end: Callable[[Trial], TrialEnd | None] = lambda _: None):
        self.ran: list[Trial] = []
        self._end = end

    def run(self, trial: Trial, judge: Judge) -> TrialEnd:
        self.ran.append(trial)
        if (end := self._end(trial)) is not None:
            return end
        for step in STEPS:
            if judge(step, loss_of(trial, step)) and step < STEPS[-1]:
                return TrialEnd(state=TrialState.pruned)
        return TrialEnd(state=TrialState.finished, value=loss_of(trial, STEPS[-1]))


def make_loop(
    study: Study,
    runner: FakeRunner,
    trials: int,
    said: list[str] | None = None,
    seconds: float | None = None,
    stops: StopRequests | None = None,
) -> SweepLoop:
    limits = Limits(trials=trials, seconds=seconds, command="python -m llmtune sweep")
    say = (said if said is not None else []).append
    return SweepLoop(study, runner, limits, stops or StopRequests(), say)
