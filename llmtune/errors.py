"""The errors a user can act on, each with the exit code that the command line returns for it."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_UNEXPECTED = 1
EXIT_STOPPED = 75
#: Plus the signal's number, as in shells (130, 143, 129): the exit code of a verb that a signal
#: ended and that cannot be resumed.
EXIT_BY_SIGNAL = 128


class LlmtuneError(Exception):
    """An error that says what went wrong, where, and what to do; printed without a traceback."""

    exit_code = EXIT_UNEXPECTED


class ConfigError(LlmtuneError):
    """A key, an option or a combination of them cannot work."""

    exit_code = 2

    @classmethod
    def from_problems(cls, problems: list[str]) -> ConfigError:
        """Join all problems into one error, so that a user fixes them at once."""
        problems = list(dict.fromkeys(problems))
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
    """A loss or a gradient is not finite, and the run ends."""


class RollbackError(LlmtuneError):
    """A loss or a gradient is not finite; the run goes back to its newest checkpoint."""


class StoppedError(LlmtuneError):
    """A signal asked for an end; the state was saved, and the same command resumes."""

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


def first_line(error: BaseException) -> str:
    """Return the first line of an error, which is short enough for a message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
