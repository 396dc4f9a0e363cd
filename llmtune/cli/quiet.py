"""Keep libraries off the console in the processes that a user reads."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """No advice and no warnings from third parties; errors still come as exceptions, and downloads show their progress."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
