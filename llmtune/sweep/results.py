"""The results of a sweep: its trials, the best one, and which keys mattered."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.config.groups.verbs.hparams_search import HparamsSearchConfig
from llmtune.errors import CheckpointError
from llmtune.security.redaction import redact_values
from llmtune.storage import layout
from llmtune.storage.plain_fields import from_plain
from llmtune.sweep.objective import Objective
from llmtune.sweep.runner import TrialCommand
from llmtune.sweep.space import Parameter, Scalar, read_space, show
from llmtune.sweep.study import Study, open_study, read_record
from llmtune.sweep.trial import Trial, TrialState

_ABSENT = "-"
_DIGITS = ".6g"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResults:
    """A sweep, whether it has ended or not."""

    folder: Path
    objective: Objective
    space: Sequence[Parameter]
    asked: int
    """Trials that the sweep should have."""
    trials: Sequence[Trial]
    best: Trial | None
    importance: dict[str, float]
    """Key -> its share, the largest first; empty where there is too little to tell."""
    command: TrialCommand

    @property
    def state(self) -> str:
        """The state in one word or two."""
        ended = sum(trial.state is not TrialState.unfinished for trial in self.trials)
        return "finished" if ended >= self.asked else f"{ended} of {self.asked} trials"

    @property
    def best_command(self) -> str:
        """The command line that trains with the best settings, in a run folder of its own."""
        assert self.best is not None
        return shlex.join(["python", "-m", "llmtune", *self.command.describe_again(self.best)])

    def run_folder(self, trial: Trial) -> Path:
        """Return the run folder of a trial."""
        return layout.trial_folder(self.folder, trial.number)

    @property
    def head(self) -> list[str]:
        """The head of the table of trials."""
        return ["trial", "state", self.objective.metric, *(p.key for p in self.space)]

    def row(self, trial: Trial) -> list[str]:
        """Return the cells of a trial."""
        value = _ABSENT if trial.value is None else f"{trial.value:{_DIGITS}}"
        settings = (self.show_value(trial, parameter.key) for parameter in self.space)
        return [str(trial.number), trial.state.value, value, *settings]

    @staticmethod
    def show_value(trial: Trial, key: str) -> str:
        """Write the value that a trial has for a key."""
        return show(trial.values[key]) if key in trial.values else _ABSENT

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without secrets."""
        best = None
        if self.best is not None:
            best = self._trial_to_json(self.best) | {"command": self.best_command}
        values: dict[str, Any] = {
            "folder": str(self.folder),
            "state": self.state,
            "goal": self.objective.goal,
            "trials": [self._trial_to_json(trial) for trial in self.trials],
            "best": best,
            "importance": self.importance,
        }
        clean: dict[str, Any] = redact_values(values)
        return clean

    def _trial_to_json(self, trial: Trial) -> dict[str, Any]:
        settings: dict[str, Scalar] = dict(trial.values)
        return {
            "number": trial.number,
            "state": trial.state.value,
            self.objective.metric: trial.value,
            "settings": settings,
            "folder": str(self.run_folder(trial)),
            "seconds": trial.seconds,
            "reason": trial.reason,
        }


def read_results(study: Study, folder: Path, asked: int, command: TrialCommand) -> SweepResults:
    """Read the results of a study."""
    return SweepResults(
        folder=folder,
        objective=study.objective,
        space=study.space,
        asked=asked,
        trials=study.list_trials(),
        best=study.best(),
        importance=study.importance(),
        command=command,
    )


def read_stored_results(folder: Path) -> SweepResults:
    """Read the results of a sweep's folder, as its last start has stored them.

    Raises:
        CheckpointError: Its file is damaged, another user's, or of a sweep that has not begun.
    """
    record = read_record(folder)
    try:
        space, problems = read_space(record["space"])
        objective = Objective.from_goal(record["goal"])
        asked, command = int(record["trials"]), from_plain(TrialCommand, record["command"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds a sweep that has not begun, or of another version"
        ) from error
    if problems:
        raise CheckpointError(f"{folder}: {problems[0]}")
    study = open_study(folder, space, objective, HparamsSearchConfig(), prunes=False)
    return read_results(study, folder, asked, command)
