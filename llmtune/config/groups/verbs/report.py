"""The keys of ``report``: the page of every run, and that of ``llmtune report``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class ReportConfig:
    """Pages about runs."""

    write: bool = True
    """Write ``report.html`` into the run folder, while a run trains and at its end.

    The variable LLMTUNE_REPORT=false turns it off for all runs.
    """
    output: str | None = None
    """File of the page of ``llmtune report``, there also ``output=``.

    Null is ``report.html`` in the folder of one run, and ``compare.html`` beside those of several.
    """
