"""The keys of ``profile``: a trace of some steps, for ``debug=profile``."""

from __future__ import annotations

from dataclasses import dataclass

#: A trace of more steps takes gigabytes, and shows nothing new.
MOST_STEPS = 20


@dataclass(slots=True, kw_only=True)
class ProfileConfig:
    """A trace of some steps by torch's profiler, written to ``profile/`` of the run folder."""

    steps: int = 0
    """Optimizer steps that are traced in each start of a run, at most 20; 0 for none."""
    warmup_steps: int = 3
    """Optimizer steps of a start before the traced ones, in which kernels and buffers are made."""
