"""Write the report of a run: ``python -m llmtune.report.program RUN CACHE [--ended]``.

It is a process of its own, so that a run neither waits for it nor ends with it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from llmtune.config.cache_folder import find_cache
from llmtune.config.groups.paths import PathsConfig
from llmtune.errors import LlmtuneError, first_line
from llmtune.process import die_with_parent
from llmtune.security.redaction import redact, restrict_umask

#: A report never takes a processor from a training.
_NICE = 19


def main(arguments: list[str]) -> int:
    """Write the report; print why not, in one line.

    Returns:
        The exit code: 0 where it was written.
    """
    die_with_parent()
    os.nice(_NICE)
    restrict_umask()
    run, cache, *options = arguments
    try:
        from llmtune.report.write import write_run_report

        write_run_report(
            Path(run), find_cache(PathsConfig(cache_dir=cache)), ended="--ended" in options
        )
    except Exception as error:
        known = isinstance(error, LlmtuneError)
        text = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
        sys.stderr.write(redact(" ".join(text.split())) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
