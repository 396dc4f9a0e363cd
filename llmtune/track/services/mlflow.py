"""MLflow: a run of the experiment that ``tracker.project`` names."""

from __future__ import annotations

import os
import time

from llmtune.storage import layout
from llmtune.track.apart.process import TrackerProcess
from llmtune.track.service import SERVICES, Service, TrackedRun
from llmtune.track.tracker import Outcome, Record, numbers_of

_STATES = {
    Outcome.finished: "FINISHED",
    Outcome.stopped: "KILLED",
    Outcome.failed: "FAILED",
}


class MlflowTracker:
    """Hands records over to a process with MLflow's client; a run that is killed fails there."""

    def __init__(self, run: TrackedRun):
        """Begin a run, or go on with that of an earlier start.

        Raises:
            TrackerProcessError: The server refuses, or cannot be reached.
        """
        # Without a server everything stays in the run folder; MLflow's own default would be a
        # folder of the working directory.
        folder = run.folder / layout.MLFLOW
        local = "MLFLOW_TRACKING_URI" not in os.environ
        if local:
            folder.mkdir(parents=True, exist_ok=True)
        self._process = TrackerProcess(
            "llmtune.track.apart.mlflow_store",
            # A store in the run folder is no reason to ask a host of MLflow's for anything.
            defaults={"MLFLOW_DISABLE_TELEMETRY": "true"},
        )
        self._process.ask(
            {
                "kind": "open",
                "uri": f"sqlite:///{folder}/mlflow.db" if local else None,
                "artifacts": folder.as_uri() if local else None,
                "project": run.config.project,
                "run_id": run.run_id,
                "name": run.name,
                "settings": run.settings,
                "plan": run.plan,
                "first_step": run.first_step,
                "metrics": str(run.folder / layout.METRICS),
                "milliseconds": int(1000 * time.time()),
            }
        )

    def log(self, record: Record) -> None:
        """Hand the record over, with the time at which it came."""
        now = int(1000 * time.time())
        numbers = {"step": record["step"], **dict(numbers_of(record))}
        self._process.send({"kind": "log", "record": numbers, "milliseconds": now})

    def summarize(self, values: Record) -> None:
        """Set values of the whole run as tags."""
        self._process.send({"kind": "summarize", "values": values})

    def abandon(self) -> None:
        """End the process, whatever it waits for."""
        self._process.kill()

    def finish(self, outcome: Outcome) -> None:
        """Close the run, and wait until all is written."""
        self._process.finish({"kind": "finish", "status": _STATES[outcome]})


SERVICES.register(
    Service(name="mlflow", title="MLflow", open=MlflowTracker, package="mlflow", extra="mlflow")
)
