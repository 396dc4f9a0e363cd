"""The keys of ``launch``: how ranks are started, restarted and stopped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, kw_only=True)
class LaunchConfig:
    """Starting, restarting and stopping of ranks."""

    nproc: int | None = None
    """Ranks on this machine; all GPUs, or 1 on a CPU."""
    sequence_parallel_size: int = 1
    """Ranks that share the tokens of the same rows, for rows too long for one GPU (Ulysses)."""
    hostfile: str | None = None
    """File that lists the machines for DeepSpeed's runner, one ``HOST slots=N`` per line.

    The runner starts the ranks on all of them through ssh.
    """
    max_restarts: int = 3
    """Restarts after a rank failure, each from the newest checkpoint; none after a user error."""
    hang_timeout: float = 1800.0
    """Seconds without any step, batch or write of any rank after which all ranks are ended.

    Their stack traces are saved.
    """
    stop_timeout: float = 900.0
    """Seconds that ranks have to save after a signal before they are killed."""
    memory_limit: Any = None
    """Memory limit per rank (``6GB``), to test what happens without memory; the plan ignores it."""
