"""The trials of a sweep in ``study.db``, an SQLite file of Optuna; each change is one transaction.

The settings of a trial are a function of the seed, its number and the trials before it, and are
stored in one step with the trial. So a sweep that is killed at any moment goes on as if it had not
been.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as State
from sqlalchemy.exc import SQLAlchemyError

from llmtune.config.groups.verbs.hparams_search import HparamsSearchConfig, Sampler
from llmtune.draws import Draw, torch_seed
from llmtune.errors import CheckpointError, first_line
from llmtune.security.trust import require_own
from llmtune.storage import layout
from llmtune.sweep.objective import Objective
from llmtune.sweep.space import Parameter, Values, count_points, list_points
from llmtune.sweep.trial import Trial, TrialState

_NAME = "sweep"
#: Attributes of the study and of a trial.
_RECORD, _REASON = "record", "reason"
#: Tries to find settings that no trial has had, before the first of those that are left are taken.
_MOST_TRIES = 20
#: Spaces of more points are not listed to find out what is left of them.
_MOST_POINTS = 100_000
#: Seeds of numpy's older generators are smaller.
_SEEDS = 2**32
#: Seconds for which another program may use the file.
_LOCK_SECONDS = 30.0

_STATES = {
    State.RUNNING: TrialState.unfinished,
    State.COMPLETE: TrialState.finished,
    State.PRUNED: TrialState.pruned,
    State.FAIL: TrialState.failed,
}


class Study:
    """The stored trials of a sweep."""

    def __init__(
        self,
        study: optuna.Study,
        space: Sequence[Parameter],
        objective: Objective,
        search: HparamsSearchConfig,
        prunes: bool,
    ):
        """
        Args:
            prunes: Trials are ended early by the median rule.
        """
        self._study = study
        self._space = list(space)
        self._objective = objective
        self._search = search
        self._distributions = {parameter.key: _to_distribution(parameter) for parameter in space}
        self._pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if prunes:
            self._pruner = optuna.pruners.MedianPruner(
                n_startup_trials=search.pruner_startup_trials,
                n_warmup_steps=search.pruner_warmup_steps,
            )

    @property
    def objective(self) -> Objective:
        """The value by which trials are compared."""
        return self._objective

    @property
    def space(self) -> list[Parameter]:
        """The searched keys."""
        return self._space

    def read_record(self) -> dict[str, Any]:
        """Return what the sweep was begun with, as plain values; empty for a new one."""
        record: dict[str, Any] = self._study.user_attrs.get(_RECORD, {})
        return record

    def write_record(self, record: dict[str, Any]) -> None:
        """Store what the sweep is begun with."""
        self._study.set_user_attr(_RECORD, record)

    def list_trials(self) -> list[Trial]:
        """List all trials by number."""
        return [_to_trial(stored, self._distributions) for stored in self._frozen()]

    def find_unfinished(self) -> Trial | None:
        """Return the trial that was begun and has not ended, if there is one."""
        return next((t for t in self.list_trials() if t.state is TrialState.unfinished), None)

    def begin(self) -> Trial | None:
        """Choose settings that no trial has had, and store a trial with them.

        Returns:
            None where all settings of the space have been tried.
        """
        values = self._choose()
        if values is None:
            return None
        with _seen_errors():
            self._study.add_trial(
                optuna.trial.create_trial(
                    state=State.RUNNING, params=values, distributions=self._distributions
                )
            )
        trial = self.find_unfinished()
        assert trial is not None
        return trial

    def judge(self, trial: Trial, step: int, value: float) -> bool:
        """Store an evaluation of the unfinished trial; tell whether it should be ended early.

        Only the newest evaluation tells. A trial that goes on does some of them again.
        """
        frozen = self._find(trial)
        is_newest = frozen.last_step is None or step >= frozen.last_step
        with _seen_errors(), warnings.catch_warnings():
            # NumPy warns of a value that is not finite, which ends the trial.
            warnings.simplefilter("ignore")
            self._study._storage.set_trial_intermediate_value(frozen._trial_id, step, value)
            return is_newest and bool(self._pruner.prune(self._study, self._find(trial)))

    def finish(self, trial: Trial, value: float) -> None:
        """End a trial with its value."""
        self._end(trial, State.COMPLETE, value)

    def prune(self, trial: Trial) -> None:
        """End a trial that was ended early; its value is the last evaluation."""
        self._end(trial, State.PRUNED)

    def fail(self, trial: Trial, reason: str) -> None:
        """End a trial that has no value."""
        trial_id = self._find(trial)._trial_id
        with _seen_errors():
            # First: a sweep that is killed in between tries the trial again.
            self._study._storage.set_trial_user_attr(trial_id, _REASON, reason)
        self._end(trial, State.FAIL)

    def best(self) -> Trial | None:
        """Return the finished trial with the best value, of equals the first; None without one."""
        sign = -1 if self._objective.maximize else 1
        finished = [t for t in self.list_trials() if t.state is TrialState.finished]
        return min(finished, key=lambda trial: sign * (trial.value or 0.0), default=None)

    def importance(self) -> dict[str, float]:
        """Return the share of each key in what makes trials good, the largest first.

        It is PED-ANOVA (Watanabe et al., 2023), which compares the settings of the best trials with
        those of all: of the best tenth, but of at least five, and of half at the most.

        Returns:
            Nothing for fewer than four finished trials, and where no key tells good from bad.
        """
        count = sum(frozen.state is State.COMPLETE for frozen in self._frozen())
        if count < 4:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(
            target_quantile=max(0.1, min(0.5, 5 / count))
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = optuna.importance.get_param_importances(
                self._study, evaluator=evaluator, normalize=False
            )
        total = sum(found.values())
        return {key: share / total for key, share in found.items()} if total > 0 else {}

    def _frozen(self) -> list[FrozenTrial]:
        with _seen_errors():
            return self._study.get_trials(deepcopy=False)

    def _find(self, trial: Trial) -> FrozenTrial:
        return self._frozen()[trial.number]

    def _end(self, trial: Trial, state: State, value: float | None = None) -> None:
        # Sampler and pruner of Optuna's own loop have no part in it.
        with _seen_errors():
            self._study.tell(trial.number, value, state=state)

    def _choose(self) -> Values | None:
        """Choose the settings of the next trial."""
        before = self._frozen()
        tried = {_identity(frozen.params) for frozen in before}
        count = count_points(self._space)
        is_listed = count is not None and count <= _MOST_POINTS
        left = (
            [point for point in list_points(self._space) if _identity(point) not in tried]
            if is_listed
            else []
        )
        if is_listed and not left:
            return None
        if self._search.sampler is Sampler.grid:
            return left[0] if left else None
        for attempt in range(_MOST_TRIES):
            values = self._sample(before, attempt)
            if _identity(values) not in tried:
                return values
        return left[0] if left else values

    def _sample(self, before: Sequence[FrozenTrial], attempt: int) -> Values:
        """Ask a sampler of its own, in memory, so that nothing half made is stored."""
        seed = torch_seed(self._search.seed, Draw.trial, len(before), attempt) % _SEEDS
        sampler: optuna.samplers.BaseSampler = (
            optuna.samplers.RandomSampler(seed=seed)
            if self._search.sampler is Sampler.random
            else optuna.samplers.TPESampler(seed=seed)
        )
        study = optuna.create_study(direction=self._study.direction, sampler=sampler)
        study.add_trials(before)
        values: Values = study.ask(self._distributions).params
        return {parameter.key: parameter.snap(values[parameter.key]) for parameter in self._space}


def open_study(
    folder: Path,
    space: Sequence[Parameter],
    objective: Objective,
    search: HparamsSearchConfig,
    prunes: bool,
) -> Study:
    """Open the study of a sweep's folder, which is locked, or make a new one.

    Raises:
        CheckpointError: The file is damaged, of another version of Optuna, or another user's.
    """
    directions = optuna.study.StudyDirection
    with _seen_errors():
        study = optuna.create_study(
            storage=_open_storage(folder / layout.STUDY),
            study_name=_NAME,
            direction=directions.MAXIMIZE if objective.maximize else directions.MINIMIZE,
            load_if_exists=True,
        )
    return Study(study, space, objective, search=search, prunes=prunes)


def read_record(folder: Path) -> dict[str, Any]:
    """Return what the sweep in a folder was begun with; empty where it has not begun.

    Raises:
        CheckpointError: As :func:`open_study`.
    """
    with _seen_errors():
        study = optuna.load_study(study_name=_NAME, storage=_open_storage(folder / layout.STUDY))
    record: dict[str, Any] = study.user_attrs.get(_RECORD, {})
    return record


def _open_storage(file: Path) -> optuna.storages.RDBStorage:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if file.exists():
        require_own(file, layout.STUDY, "take another output_dir=", CheckpointError)
    # The path is not part of the address, in which some characters have a meaning.
    return optuna.storages.RDBStorage(
        "sqlite://", engine_kwargs={"creator": lambda: sqlite3.connect(file, timeout=_LOCK_SECONDS)}
    )


@contextlib.contextmanager
def _seen_errors() -> Iterator[None]:
    """Turn what the file's libraries raise into an error for the user.

    Raises:
        CheckpointError: The file cannot be read or written.
    """
    try:
        yield
    except (
        *(SQLAlchemyError, sqlite3.Error, optuna.exceptions.OptunaError),
        # What Optuna raises for a file that holds something else.
        *(RuntimeError, LookupError, ValueError),
    ) as error:
        if "database is locked" in str(error):
            raise CheckpointError(
                f"{layout.STUDY} of the sweep is used by another program, and has been for"
                f" {_LOCK_SECONDS:.0f} s; end it, and start the sweep again"
            ) from error
        raise CheckpointError(
            f"{layout.STUDY} of the sweep cannot be used: {first_line(error)}; take another"
            " output_dir=, or put back a copy of the file"
        ) from error


def _to_distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.choices:
        return CategoricalDistribution(parameter.choices)
    if parameter.is_integer:
        low, step = int(parameter.low), int(parameter.step or 1)
        # Optuna asks for a range that ends with a step.
        last = low + (int(parameter.high) - low) // step * step
        return IntDistribution(low, last, log=parameter.is_log, step=step)
    high = parameter.high if parameter.step is None else parameter.last
    return FloatDistribution(parameter.low, high, log=parameter.is_log, step=parameter.step)


def _to_trial(frozen: FrozenTrial, space: dict[str, BaseDistribution]) -> Trial:
    began, ended = frozen.datetime_start, frozen.datetime_complete
    # A file may hold anything: keys that are not searched never reach a command line.
    values = {key: frozen.params[key] for key in space if key in frozen.params}
    return Trial(
        number=frozen.number,
        values=values,
        state=_STATES[frozen.state],
        value=frozen.value if frozen.state in (State.COMPLETE, State.PRUNED) else None,
        reason=str(frozen.user_attrs.get(_REASON, "")),
        seconds=(ended - began).total_seconds() if began and ended else 0.0,
        evaluations=dict(sorted(frozen.intermediate_values.items())),
    )


def _identity(values: Values) -> tuple[tuple[str, str], ...]:
    """Return what two trials with the same settings share; 1 and 1.0 are the same learning rate."""
    return tuple(sorted((key, _number_text(value)) for key, value in values.items()))


def _number_text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return repr(value)
    # Of steps in a range, which are sums of parts.
    return f"{value:.12g}" if math.isfinite(value) else repr(value)
