"""Keep libraries off the console in the processes that a user reads."""

from __future__ import annotations

import logging
import os
import warnings

from llmtune.process import no_collection


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
