#!/opt/venv/bin/python
"""The health check of llmtune's images: is what the container is for at work?

    health.py train          every rank under way has made progress lately
    health.py http URL       a page answers
    health.py ssh PORT       a server of SSH greets

It imports the standard library alone, so that it takes a blink beside a training.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

#: Seconds without progress, as launch.hang_timeout; ten times that in a phase that notes nothing.
LIMIT_SECONDS = 1800.0
PHASES_WITHOUT_NOTES = ("start", "load", "answer")
WITHOUT_NOTES_FACTOR = 10
#: Names the limit, for a run with another launch.hang_timeout.
VARIABLE = "LLMTUNE_HEALTH_SECONDS"
#: Where llmtune's ranks note what they do (llmtune/storage/rank_files.py).
RECORDS = "llmtune-*/phase-*.json"


def find_stuck_rank(folder: Path, limit_seconds: float, now: float) -> str | None:
    """Return what is wrong with the ranks whose records are in a folder; None if nothing is.

    Where no rank is under way (a plan, an export, a start), nothing is.
    """
    for file in sorted(folder.glob(RECORDS)):
        try:
            age = now - file.stat().st_mtime
            record = json.loads(file.read_text() or "{}")
        except (OSError, ValueError):
            # It has just ended, or is just writing.
            continue
        phase = str(record.get("phase", "start"))
        limit = limit_seconds * (WITHOUT_NOTES_FACTOR if phase in PHASES_WITHOUT_NOTES else 1)
        if age > limit:
            return (
                f"{file.stem}: no progress for {age:.0f} s in {phase!r}, step {record.get('step')}"
            )
    return None


def find_silent_page(url: str) -> str | None:
    """Return why a page does not answer; None if it does."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return None if answer.status < 400 else f"{url}: {answer.status}"
    except OSError as error:
        return f"{url}: {error}"


def find_silent_ssh(port: int) -> str | None:
    """Return why a server of SSH does not greet; None if it does."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            greeting = connection.recv(64)
    except OSError as error:
        return f"port {port}: {error}"
    return None if greeting.startswith(b"SSH-2.0-") else f"port {port}: no server of SSH"


def main(arguments: list[str]) -> int:
    """Print the problem, if there is one; the exit code is that of Docker's health checks."""
    match arguments:
        case ["train"]:
            limit = float(os.environ.get(VARIABLE, LIMIT_SECONDS))
            problem = find_stuck_rank(Path(tempfile.gettempdir()), limit, time.time())
        case ["http", url]:
            problem = find_silent_page(url)
        case ["ssh", port]:
            problem = find_silent_ssh(int(port))
        case _:
            problem = "usage: health.py train | http URL | ssh PORT"
    if problem is not None:
        sys.stdout.write(f"{problem}\n")
    return 0 if problem is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
