"""Trackio: a local database, or a Space that ``TRACKIO_SPACE_ID`` names."""

from __future__ import annotations

from llmtune.track.service import SERVICES, Service, TrackedRun
from llmtune.track.tracker import Outcome, Record, numbers_of


class TrackioTracker:
    """Logs every number of a record under its step."""

    def __init__(self, run: TrackedRun):
        """Begin a run, or go on with that of an earlier start, which has the same name."""
        import trackio

        self._run = trackio.init(
            run.config.project,
            # Trackio finds runs by their names.
            name=f"{run.name}-{run.run_id}",
            config={**run.settings, "plan": run.plan},
            resume="allow",
            embed=False,
            # Records have the memory of the rank; its threads would read the whole machine.
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, record: Record) -> None:
        """Log the numbers of a record."""
        self._run.log(dict(numbers_of(record)), step=record["step"])

    def summarize(self, values: Record) -> None:
        """Log values of the whole run."""
        numbers = {f"summary/{key}": value for key, value in numbers_of(values)}
        if numbers:
            self._run.log(numbers)

    def finish(self, outcome: Outcome) -> None:
        """Write the rest. Trackio has no state for a run that failed, so that it is a value."""
        self._run.log({"summary/has_finished": float(outcome is Outcome.finished)})
        self._run.finish()


SERVICES.register(
    Service(
        name="trackio", title="Trackio", open=TrackioTracker, package="trackio", extra="trackio"
    )
)
