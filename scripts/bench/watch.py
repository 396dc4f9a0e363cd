"""One side of a comparison as a process of its own, and the peak of its memory while it runs.

Imports nothing of llmtune.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

#: Bytes of a process and its children, by kind.
Read = Callable[[int], dict[str, int]]


def run_watched(
    command: list[str], read: Read, interval: float = 0.02, **env: str
) -> dict[str, Any]:
    """Run a command whose last line is JSON; that, and the peak of each number that ``read`` finds.

    Args:
        interval: Seconds between two looks.
        env: Added to the environment.

    Raises:
        RuntimeError: It failed.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **env}
        )
        peaks: dict[str, int] = {}
        done = threading.Event()

        def watch() -> None:
            while not done.wait(interval):
                for kind, size in read(process.pid).items():
                    peaks[kind] = max(peaks.get(kind, 0), size)

        watcher = threading.Thread(target=watch)
        watcher.start()
        out, _ = process.communicate()
        done.set()
        watcher.join()
        if process.returncode:
            errors.seek(0)
            last = "\n".join(errors.read().splitlines()[-6:])
            raise RuntimeError(f"{' '.join(command[:3])} ended with {process.returncode}:\n{last}")
    found: Mapping[str, Any] = json.loads(out.splitlines()[-1])
    return {**found, **peaks}


def anonymous(pid: int) -> dict[str, int]:
    """For :func:`run_watched`: anonymous memory, without mapped files, whose pages the kernel takes
    back when it wants.
    """
    return {"peak_bytes": anonymous_bytes(pid)}


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process and its children; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = next(
        (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")),
        0,
    )
    return own + sum(anonymous_bytes(int(child)) for child in children)


def resident(pid: int) -> dict[str, int]:
    """For :func:`run_watched`: memory of the process tree, shared pages divided among those who
    share them, and not.
    """
    import psutil

    pss = rss = 0
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return {}
    for member in tree:
        try:
            memory = member.memory_full_info()
        except psutil.Error:
            continue
        pss, rss = pss + memory.pss, rss + memory.rss
    return {"pss_bytes": pss, "rss_bytes": rss}
