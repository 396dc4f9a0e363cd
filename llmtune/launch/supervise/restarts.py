"""Decide whether failed ranks are restarted, and after which wait: progress counts."""

from llmtune.errors import LlmtuneError
from llmtune.launch.supervise.outcome import RanksFailedError

#: Seconds before the first restart; doubled with each further one.
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
        """Count a restart after an attempt that began at ``first_step``.

        A rollback is not counted here: the ranks count their own.

        Returns:
            Seconds to wait before the restart.

        Raises:
            LlmtuneError: The failure, where there is no further restart.
        """
        if failure.rollback:
            # The steps after the checkpoint are trained again.
            self._furthest_step = 0
            return 0.0
        # Progress is a step that no earlier attempt finished.
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
        return min(FIRST_WAIT_SECONDS * 2.0 ** (self.done - 1), LONGEST_WAIT_SECONDS)

    def describe(self, wait_seconds: float) -> str:
        """Describe the latest restart, as the end of a message; empty after a rollback."""
        if not wait_seconds:
            return ""
        return f" (restart {self.done} of {self.limit}) in {wait_seconds:g} s"
