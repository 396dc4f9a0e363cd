"""Write to the terminal of the user, and keep libraries off it."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from llmtune.process import no_collection
from llmtune.security.redaction import redact
from llmtune.security.terminal import to_terminal


def quiet_environment() -> None:
    """Quiet libraries that are not imported yet, here and in processes started from here."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def quiet_libraries() -> None:
    """Keep advice and warnings of libraries off the console.

    Errors still come as exceptions, and downloads show their progress.
    """
    quiet_environment()
    with no_collection():
        import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class Output:
    """Writer to standard output; see :func:`stdout_for_us`."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def __call__(self, text: str) -> None:
        """Write a text without secrets and without control characters."""
        self._stream.write(to_terminal(text))

    def in_color(self, text: str) -> None:
        """Write a text with colors, made with :func:`~llmtune.security.terminal.color`."""
        self._stream.write(redact(text))


@contextmanager
def stdout_for_us() -> Iterator[Output]:
    """Give a writer to standard output; what libraries print meanwhile goes to standard error."""
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        yield Output(own)
    finally:
        own.flush()
        sys.stdout.flush()
        os.dup2(own.fileno(), 1)
        own.close()
