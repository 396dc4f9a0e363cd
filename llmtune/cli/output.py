"""Write to the terminal that a user reads, and keep libraries off it."""

from __future__ import annotations

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
    """For libraries that are not imported yet, here and in processes that are started from here."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def quiet_libraries() -> None:
    """No advice and no warnings from third parties; errors still come as exceptions, and downloads
    show their progress.
    """
    quiet_environment()
    with no_collection():
        import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class Output:
    """Writes to standard output; see :func:`stdout_for_us`."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def __call__(self, text: str) -> None:
        """Without secrets, and without what a terminal would obey."""
        self._stream.write(to_terminal(text))

    def in_color(self, text: str) -> None:
        """A text with colors of ours, made with :func:`~llmtune.security.terminal.color`; all
        else as above.
        """
        self._stream.write(redact(text))


@contextmanager
def stdout_for_us() -> Iterator[Output]:
    """A writer to standard output, which libraries cannot reach meanwhile: they print to standard
    error.
    """
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
