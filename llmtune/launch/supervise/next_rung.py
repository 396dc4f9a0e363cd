"""Memory that runs out in a rank of a foreign launcher, told to the next start of the run.

No supervisor watches these ranks, and they may be on several machines. The rank that ran out says
so in the run folder, which all of them share. All end with the exit code that launchers and
schedulers answer by starting the same command again, whose rank 0 then takes the next rung.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError, StoppedError
from llmtune.launch.supervise.out_of_memory import MemoryEvent, find_own_event
from llmtune.plan.run_record import MemoryFailure
from llmtune.storage import layout
from llmtune.storage.atomic import write_atomically
from llmtune.storage.plain_fields import from_plain
from llmtune.storage.plain_json import parse_json

#: How long a rank that lost its connection looks for another's failure, in seconds: a file system
#: of several machines shows a new file late.
_LOOK_SECONDS = 5.0
_POLL_SECONDS = 0.2


class NextRungError(StoppedError):
    """Memory ran out; the same command takes the next rung, from the newest checkpoint."""


@contextmanager
def tell_next_start(
    run: Path, rank: int, phases: Path, make_failure: Callable[[MemoryEvent], MemoryFailure]
) -> Iterator[None]:
    """In the block, turn memory that runs out, in whichever rank, into :class:`NextRungError`.

    Args:
        run: The run folder.
        phases: The folder with this rank's record of its phase, as that of rank 0.
        make_failure: Adds to an event the placement that was not enough.

    Raises:
        NextRungError: This rank ran out of memory, or another one did.
    """
    try:
        yield
    except (LlmtuneError, KeyboardInterrupt):
        raise
    except BaseException as error:
        event = find_own_event(error, phases, rank)
        if event is not None:
            # The disk may be what is full.
            with contextlib.suppress(OSError):
                text = json.dumps(asdict(make_failure(event)))
                write_atomically(layout.memory_failure_file(run, rank), text)
            raise NextRungError(_describe(event.describe())) from error
        # gloo and NCCL raise it where a connection is lost.
        other = _await_failure(run) if isinstance(error, RuntimeError) else None
        if other is None:
            raise
        raise NextRungError(_describe(other.describe())) from error


def take_failures(run: Path, history: tuple[MemoryFailure, ...]) -> tuple[MemoryFailure, ...]:
    """Return a run's failures with what the ranks of the last start have left, and no file of it.

    Several ranks may have run out of memory under one placement; the first of them counts.
    """
    found = sorted(_read_failures(run), key=lambda failure: failure.time)
    for failure in found:
        if not any(_is_same(failure, entry) for entry in history):
            history = (*history, failure)
    return history


def remove_failures(run: Path) -> None:
    """Remove what the ranks have left, once ``plan.json`` has it."""
    for file in run.glob(layout.MEMORY_FAILURES):
        file.unlink(missing_ok=True)


def _is_same(failure: MemoryFailure, entry: MemoryFailure) -> bool:
    return (failure.candidate, failure.conditions) == (entry.candidate, entry.conditions)


def _describe(event: str) -> str:
    return f"{event}\nThe same command takes the next rung, from the newest checkpoint."


def _await_failure(run: Path) -> MemoryEvent | None:
    """Look for another rank's failure, which this one notices as a lost connection."""
    deadline = time.monotonic() + _LOOK_SECONDS
    while True:
        for failure in _read_failures(run):
            values: dict[str, Any] = asdict(failure)
            return MemoryEvent(**{name: values[name] for name in MemoryEvent.__slots__})
        if time.monotonic() > deadline:
            return None
        time.sleep(_POLL_SECONDS)


def _read_failures(run: Path) -> list[MemoryFailure]:
    """Read what ranks have left; a file that was cut off says nothing."""
    found = []
    for file in run.glob(layout.MEMORY_FAILURES):
        try:
            found.append(from_plain(MemoryFailure, parse_json(file.read_bytes())))
        except (OSError, ValueError, TypeError):
            continue
    return found
