"""MLflow's client, in a process of its own: ``python -m llmtune.track.apart.mlflow_store``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from llmtune.storage import layout
from llmtune.track.apart.process import Handler, Message, serve
from llmtune.track.metrics import read_metrics
from llmtune.track.tracker import numbers_of

#: By this tag a resumed start finds its run.
_RUN_TAG = "llmtune.run_id"
#: MLflow's limits of one call, and of the text of a parameter.
_PARAMS_PER_CALL, _METRICS_PER_CALL, _PARAM_LENGTH = 100, 1000, 6000


class MlflowStore(Handler):
    """Writes every number of a record as a metric of its step, and settings as parameters."""

    def __init__(self) -> None:
        self._client: Any = None
        self._run_id = ""
        self._is_resumed = False
        self._steps: dict[str, set[int]] = {}

    def __call__(self, messages: list[Message], /) -> None:
        """Handle messages of one kind; without a last one, the run has failed."""
        if not messages:
            if self._run_id:
                self._client.set_terminated(self._run_id, "FAILED")
            return
        kind, message = messages[0]["kind"], messages[0]
        if kind == "open":
            self._open(message)
        elif kind == "log":
            self._log(messages)
        elif kind == "summarize":
            for key, value in message["values"].items():
                self._client.set_tag(self._run_id, key, value)
        else:
            self._client.set_terminated(self._run_id, message["status"])

    def _open(self, message: Message) -> None:
        """Begin a run, or go on with that of an earlier start."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = client = MlflowClient(message["uri"])
        experiment = self._find_experiment(message["project"], message["artifacts"])
        found = client.search_runs([experiment], f"tags.`{_RUN_TAG}` = '{message['run_id']}'")
        if found:
            self._run_id, self._is_resumed = found[0].info.run_id, True
            client.update_run(self._run_id, status="RUNNING")
            self._fill(message)
            return
        tags = {_RUN_TAG: message["run_id"]}
        begun = client.create_run(experiment, run_name=message["name"], tags=tags)
        self._run_id = begun.info.run_id
        settings = _flatten(message["settings"])
        params = (Param(key, str(value)[:_PARAM_LENGTH]) for key, value in settings)
        while batch := list(islice(params, _PARAMS_PER_CALL)):
            client.log_batch(self._run_id, params=batch)
        client.log_dict(self._run_id, message["plan"], layout.PLAN)
        self._fill(message)

    def _find_experiment(self, project: str, artifacts: str | None) -> str:
        if (known := self._client.get_experiment_by_name(project)) is not None:
            return str(known.experiment_id)
        return str(self._client.create_experiment(project, artifact_location=artifacts))

    def _log(self, messages: list[Message]) -> None:
        """Write the numbers of records, as many in one call as MLflow takes."""
        from mlflow.entities import Metric

        metrics = (
            Metric(key, value, message["milliseconds"], message["record"]["step"])
            for message in messages
            for key, value in numbers_of(message["record"])
            if math.isfinite(value) and not self._is_known(key, message["record"]["step"])
        )
        while batch := list(islice(metrics, _METRICS_PER_CALL)):
            self._client.log_batch(self._run_id, metrics=batch)

    def _fill(self, message: Message) -> None:
        """Write what earlier starts have not: they may have been killed before MLflow had it."""
        before = [
            {"record": record, "milliseconds": message["milliseconds"]}
            for record in read_metrics(Path(message["metrics"]))
            if record["step"] <= message["first_step"]
        ]
        if before and message["first_step"] > 0:
            self._log(before)

    def _is_known(self, key: str, step: int) -> bool:
        """Tell whether an earlier start has written this step, from behind its last checkpoint."""
        if not self._is_resumed:
            return False
        if key not in self._steps:
            history = self._client.get_metric_history(self._run_id, key)
            self._steps[key] = {metric.step for metric in history}
        return step in self._steps[key]


def _flatten(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings by their dotted keys; MLflow's names take neither brackets nor commas."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


if __name__ == "__main__":
    serve(MlflowStore())
