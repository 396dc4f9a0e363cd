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

#: Variables that quiet libraries, unless the user has set them.
_QUIET = {
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DS_LOG_LEVEL": "error",
}


def quiet_environment() -> None:
    """Quiet libraries that are not imported yet, here and in processes started from here."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
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


@contextmanager
def quieted_libraries() -> Iterator[None]:
    """Quiet libraries in the block alone: the program around it is somebody else's."""
    import transformers

    found = {name: os.environ.get(name) for name in _QUIET}
    disabled = logging.root.manager.disable
    verbosity = transformers.logging.get_verbosity()
    has_bar = transformers.logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        quiet_libraries()
        try:
            yield
        finally:
            for name, value in found.items():
                if value is None:
                    os.environ.pop(name, None)
            logging.disable(disabled)
            transformers.logging.set_verbosity(verbosity)
            if has_bar:
                transformers.logging.enable_progress_bar()


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
