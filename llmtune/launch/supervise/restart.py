"""Decide whether ranks that failed are started again, and after how long, by their progress."""

from __future__ import annotations

from llmtune.errors import LlmtuneError
from llmtune.launch.supervise.outcome import RanksFailedError

#: Seconds before the first restart; doubled with each.
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0


class Restarts:
    """The restarts of one command."""

    def __init__(self, limit: int):
        self.limit = limit
        self.done = 0
        self._furthest_step = 0
        self._without_progress = 0

    def take(self, failure: RanksFailedError, first_step: int) -> float:
        """Take one more, after an attempt that went on from ``first_step``; the seconds to wait
        before.

        A rank that asks for a rollback counts these itself.

        Raises:
            LlmtuneError: The failure, where no more is to be had.
        """
        if failure.rollback:
            # The steps from there on are made anew.
            self._furthest_step = 0
            return 0.0
        # New is what no attempt did before: one that fails at the same step again and again does
        # not make progress.
        is_progress = failure.step > max(first_step, self._furthest_step)
        self._furthest_step = max(failure.step, self._furthest_step)
        self._without_progress = 0 if is_progress else self._without_progress + 1
        if self.limit == 0:
            raise LlmtuneError(str(failure))
        if self._without_progress > 1:
            raise LlmtuneError(f"{failure}\nNot started again: it failed twice without a new step.")
        if self.done >= self.limit:
            raise LlmtuneError(
                f"{failure}\nNot started again: launch.max_restarts={self.limit} are used up."
            )
        self.done += 1
        return min(FIRST_WAIT_SECONDS * 2 ** (self.done - 1), LONGEST_WAIT_SECONDS)

    def describe(self, wait_seconds: float) -> str:
        """The one that was taken last."""
        return (
            f" (restart {self.done} of {self.limit}) in {wait_seconds:g} s" if wait_seconds else ""
        )
