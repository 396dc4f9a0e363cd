"""The two sides of a process that tracks: one message per line, in JSON.

Threads share Python's lock. MLflow's store in SQLite needs 15 ms of it for a record, and a training
thread that wants the lock back waits for as long as 5 ms each time, which is much beside the small
steps of a small model. A process of its own has a lock of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from queue import Empty, Full, Queue
from typing import IO, Any

from llmtune.track.tracker import LateError

Message = dict[str, Any]
"""It has ``kind``, and what belongs to it."""

#: Messages that may wait in the process for its library; further ones wait in the pipe.
_CAPACITY = 1000
#: Seconds that the process has when the one that started it is gone.
_ORPHAN_SECONDS = 20.0
_POLL_SECONDS = 0.5
#: Seconds that a process has to end by itself after an error.
_END_SECONDS = 5.0
#: In the place of a message that has not come.
_NOTHING: Message = {}


class TrackerProcessError(LateError):
    """The process has failed; the text is its own error."""


class TrackerProcess:
    """The side of the run; used by one thread."""

    def __init__(self, module: str, defaults: Mapping[str, str] | None = None):
        """
        Args:
            module: What runs in the process; it gives :func:`serve` something to call.
            defaults: Environment variables of the process, where the run's do not have them.
        """
        # A pipe would have to be read while the process runs.
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            # The number of this process, which may be gone before the other one can ask for it.
            [sys.executable, "-m", module, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**(defaults or {}), **os.environ, "OMP_NUM_THREADS": "1"},
            # Signals of a terminal reach the run alone, which then says how it has ended.
            start_new_session=True,
        )

    def send(self, message: Message) -> None:
        """Hand a message over, without waiting for what becomes of it.

        Raises:
            TrackerProcessError: The process has failed.
        """
        pipe = self._process.stdin
        assert pipe is not None
        try:
            # What is no JSON, such as a path in a plug-in's settings, is sent as its text.
            pipe.write(json.dumps(message, default=str) + "\n")
            pipe.flush()
        except OSError:
            raise self._end_with_error(None) from None

    def ask(self, message: Message) -> None:
        """Hand a message over, and wait until all up to it are done.

        Raises:
            TrackerProcessError: The process has failed.
        """
        self.send({**message, "answer": True})
        answer = self._read()
        if answer is None or "error" in answer:
            raise self._end_with_error(answer)

    def finish(self, message: Message) -> None:
        """Hand the last message over, and wait until the process has ended.

        It ends by itself: children of this process may hold the pipe open.

        Raises:
            TrackerProcessError: The process has failed.
        """
        self.ask({**message, "last": True})
        self.close()

    def kill(self) -> None:
        """End the process at once; may be called by another thread."""
        self._process.kill()

    def close(self) -> None:
        """Let the process end, and wait for it."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        self._process.wait()
        self._errors.close()

    def _read(self) -> Message | None:
        pipe = self._process.stdout
        assert pipe is not None
        answer: Message | None = json.loads(line) if (line := pipe.readline()) else None
        return answer

    def _end_with_error(self, answer: Message | None) -> TrackerProcessError:
        # What it answers before it ends is still in the pipe when it no longer reads.
        answer = answer or self._read()
        while answer is not None and "error" not in answer:
            answer = self._read()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self.close()
        if answer is not None:
            return TrackerProcessError(str(answer["error"]), answer["step"])
        was_killed = self._process.returncode < 0 or not lines
        return TrackerProcessError("its process was killed" if was_killed else lines[-1], None)


class Handler:
    """Handles what the run sends to its process; a tracker's library is behind it."""

    def __call__(self, messages: list[Message], /) -> None:
        """Handle messages of one kind; none where there are no more, and the last has not come."""
        raise NotImplementedError


def serve(handle: Handler) -> None:
    """Be the other side: handle messages until the last one, or until the run is gone.

    Each of kind ``log`` is handled together with those that have come behind it. An exception of
    the handler is answered, and ends the process.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # What a library prints does not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    waiting: Queue[Message | None] = Queue(_CAPACITY)
    threading.Thread(target=_receive, args=(waiting,), daemon=True).start()
    parent = int(sys.argv[1])
    threading.Thread(target=_end_with, args=(parent, waiting), daemon=True).start()
    step: int | None = None
    try:
        for group in _groups(waiting):
            handle(group)
            if group[-1]["kind"] == "log":
                step = group[-1]["record"]["step"]
            if group[-1].get("answer", False):
                _answer(answers, {})
            if group[-1].get("last", False):
                return
    except BaseException as error:
        _answer(answers, {"error": f"{type(error).__name__}: {error}", "step": step})
        with contextlib.suppress(Exception):
            handle([])
        raise
    handle([])


def _groups(waiting: Queue[Message | None]) -> Iterator[list[Message]]:
    """Yield messages: those of kind ``log`` that wait in a row together, others alone."""
    message = waiting.get()
    while message is not None:
        group = [message]
        following: Message | None = _NOTHING
        while group[-1]["kind"] == "log" and following is _NOTHING:
            try:
                following = waiting.get_nowait()
            except Empty:
                break
            if following is not None and following["kind"] == "log":
                group.append(following)
                following = _NOTHING
        yield group
        message = waiting.get() if following is _NOTHING else following


def _receive(waiting: Queue[Message | None]) -> None:
    try:
        for line in sys.stdin:
            waiting.put(json.loads(line))
    except ValueError:
        # The run was killed in the middle of a line.
        pass
    waiting.put(None)


def _end_with(parent: int, waiting: Queue[Message | None]) -> None:
    """End some time after the run was killed, whatever the library waits for.

    Children of the run may hold the pipe open for some seconds, so that its end is not seen.
    """
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    time.sleep(_ORPHAN_SECONDS / 2)
    with contextlib.suppress(Full):
        waiting.put_nowait(None)
    time.sleep(_ORPHAN_SECONDS / 2)
    os._exit(1)


def _answer(answers: IO[str], answer: Message) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
