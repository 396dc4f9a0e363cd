"""TensorBoard: event files below the run folder."""

from __future__ import annotations

from llmtune.storage import layout
from llmtune.track.service import SERVICES, Service, TrackedRun
from llmtune.track.tracker import Outcome, Record, numbers_of

#: Seconds after which events are on the disk, where TensorBoard reads them.
_FLUSH_SECONDS = 20


class TensorboardTracker:
    """Writes every number of a record as a scalar of its step."""

    def __init__(self, run: TrackedRun):
        """Begin an event file of this start.

        Raises:
            OSError: The folder cannot be written to.
        """
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run does the steps after its checkpoint again: what an earlier start wrote
        # about them is hidden by TensorBoard.
        purge_step = run.first_step + 1 if run.first_step else None
        self._writer = SummaryWriter(
            str(run.folder / layout.TENSORBOARD), purge_step=purge_step, flush_secs=_FLUSH_SECONDS
        )

    def log(self, record: Record) -> None:
        """Write the numbers of a record; those of an evaluation are named ``eval_...``."""
        for key, value in numbers_of(record):
            self._writer.add_scalar(key, value, record["step"])

    def summarize(self, values: Record) -> None:
        """Write values of the whole run as a text."""
        text = "  \n".join(f"{key}: {value}" for key, value in values.items())
        self._writer.add_text("summary", text)

    def finish(self, _outcome: Outcome) -> None:
        """Write the rest."""
        self._writer.close()


SERVICES.register(
    Service(
        name="tensorboard",
        title="TensorBoard",
        open=TensorboardTracker,
        package="tensorboard",
        extra="tensorboard",
    )
)
