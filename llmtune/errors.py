"""The errors a user can act on, each with the exit code that the command line returns for it."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_UNEXPECTED = 1
EXIT_STOPPED = 75
#: A verb that leaves nothing to go on with, ended by a signal: this and its number, as shells give
#: it (130, 143 and 129).
EXIT_BY_SIGNAL = 128


class LlmtuneError(Exception):
    """What went wrong, where, with which value, and what to do next; printed without a
    traceback.
    """

    exit_code = EXIT_UNEXPECTED


class ConfigError(LlmtuneError):
    """A key, an option or a combination of them cannot work."""

    exit_code = 2

    @classmethod
    def from_problems(cls, problems: list[str]) -> ConfigError:
        """One error for every problem found, so that a user mends them in one go."""
        if len(problems) == 1:
            return cls(problems[0])
        return cls(
            f"{len(problems)} problems in the configuration:\n"
            + "\n".join(f"  - {p}" for p in problems)
        )


class DoesNotFitError(LlmtuneError):
    """The run needs more memory than the hardware has."""

    exit_code = 3


class DataError(LlmtuneError):
    """The training data cannot be used as it is."""

    exit_code = 4


class CheckpointError(LlmtuneError):
    """A checkpoint or a run folder is damaged, or belongs to another run."""

    exit_code = 5


class ExportError(LlmtuneError):
    """A merge or an export would be wrong."""

    exit_code = 6


class MissingPrerequisiteError(LlmtuneError):
    """Something outside llmtune is missing: CUDA, a network, a package."""

    exit_code = 7


class DivergedError(LlmtuneError):
    """A loss or a gradient is not finite, and the run is not to go on."""


class RollbackError(LlmtuneError):
    """Numbers went bad; the run goes back to its newest checkpoint."""


class StoppedError(LlmtuneError):
    """A signal asked for an end; the state was saved and the same command goes on."""

    exit_code = EXIT_STOPPED


#: Exit code -> error class, for errors that cross a process boundary as a code and a text.
ERRORS_BY_CODE: dict[int, type[LlmtuneError]] = {
    error.exit_code: error
    for error in (
        ConfigError,
        DoesNotFitError,
        DataError,
        CheckpointError,
        ExportError,
        MissingPrerequisiteError,
        StoppedError,
    )
}
