"""A tracker that nobody needs: a notebook in the run folder."""

from __future__ import annotations

from pathlib import Path

from llmtune.track.service import SERVICES, Service, TrackedRun
from llmtune.track.tracker import Outcome, Record


class Notebook:
    """Writes down what it sees."""

    def __init__(self, run: TrackedRun):
        self._file = Path(run.folder) / "notebook.txt"
        self._write(
            f"begins {run.name} of project {run.config.project}, seed {run.settings['seed']}"
        )
        run.say("the notebook is open")

    def log(self, record: Record) -> None:
        """A line per record."""
        self._write(f"step {record['step']}: {', '.join(sorted(record))}")

    def finish(self, outcome: Outcome) -> None:
        """The last line."""
        self._write(f"ends: {outcome.value}")

    def _write(self, text: str) -> None:
        with self._file.open("a") as file:
            file.write(text + "\n")


SERVICES.register(Service(name="notebook", title="the notebook", open=Notebook))
