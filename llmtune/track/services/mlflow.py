"""MLflow: a run of the experiment that ``tracker.project`` names."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

from llmtune.storage import layout
from llmtune.track.service import SERVICES, Service, TrackedRun
from llmtune.track.tracker import Outcome, Record, numbers_of

#: By this tag a resumed start finds its run.
_RUN_TAG = "llmtune.run_id"
#: MLflow's limits of one call, and of the text of a parameter.
_PARAMS_PER_CALL, _PARAM_LENGTH = 100, 6000
_STATES = {
    Outcome.finished: "FINISHED",
    Outcome.stopped: "KILLED",
    Outcome.failed: "FAILED",
}


class MlflowTracker:
    """Logs every number of a record as a metric of its step, and settings as parameters."""

    def __init__(self, run: TrackedRun):
        """Begin a run, or go on with that of an earlier start.

        Raises:
            mlflow.exceptions.MlflowException: The server refuses, or cannot be reached.
        """
        from mlflow import MlflowClient
        from mlflow.entities import Param

        # Without a server everything stays in the run folder; MLflow's own default would be a
        # folder of the working directory.
        folder = run.folder / layout.MLFLOW
        local = "MLFLOW_TRACKING_URI" not in os.environ
        if local:
            folder.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(f"sqlite:///{folder}/mlflow.db" if local else None)
        experiment = self._find_experiment(run, folder.as_uri() if local else None)
        found = self._client.search_runs([experiment], f"tags.`{_RUN_TAG}` = '{run.run_id}'")
        if found:
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        begun = self._client.create_run(experiment, run_name=run.name, tags={_RUN_TAG: run.run_id})
        self._run_id = begun.info.run_id
        params = (Param(key, str(value)[:_PARAM_LENGTH]) for key, value in _flatten(run.settings))
        while batch := list(islice(params, _PARAMS_PER_CALL)):
            self._client.log_batch(self._run_id, params=batch)
        self._client.log_dict(self._run_id, run.plan, layout.PLAN)

    def _find_experiment(self, run: TrackedRun, artifacts: str | None) -> str:
        name = run.config.project
        if (known := self._client.get_experiment_by_name(name)) is not None:
            return str(known.experiment_id)
        return str(self._client.create_experiment(name, artifact_location=artifacts))

    def log(self, record: Record) -> None:
        """Log the numbers of a record."""
        from mlflow.entities import Metric

        now, step = int(1000 * time.time()), record["step"]
        metrics = [
            Metric(key, value, now, step)
            for key, value in numbers_of(record)
            if math.isfinite(value)
        ]
        self._client.log_batch(self._run_id, metrics=metrics)

    def summarize(self, values: Record) -> None:
        """Set values of the whole run as tags."""
        for key, value in values.items():
            self._client.set_tag(self._run_id, key, value)

    def finish(self, outcome: Outcome) -> None:
        """Close the run."""
        self._client.set_terminated(self._run_id, _STATES[outcome])


def _flatten(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings by their dotted keys; MLflow's names take neither brackets nor commas."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


SERVICES.register(
    Service(name="mlflow", title="MLflow", open=MlflowTracker, package="mlflow", extra="mlflow")
)
