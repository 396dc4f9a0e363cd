"""Handle signals that ask for an end: remember them while ranks can save, otherwise end."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from llmtune.errors import EXIT_BY_SIGNAL, EXIT_STOPPED, StoppedError
from llmtune.launch.processes.descendants import adopt_orphans, end_now
from llmtune.process import END_SIGNALS, STOP_SIGNALS, raise_or_hold, without_ignored

#: Time for the clean-up of an interrupted verb; processes that are still left then are killed.
END_SECONDS = 5.0

#: Message of a stop before there is anything to save.
NOT_BEGUN = "stopped before training began; nothing is lost, the same command starts again"
#: Message of a stop after the training.
NOT_EXPORTED = (
    "stopped during the export; the model is trained, and the same command continues the export"
)


class StopRequests:
    """The signals that were received, in order."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []

    @property
    def at_once(self) -> bool:
        """Tell whether Ctrl-C was pressed twice.

        Other pairs of signals do not count: Slurm sends SIGTERM after SIGUSR1, which must not
        interrupt a save.
        """
        return self.received.count(signal.SIGINT) > 1


@contextmanager
def remember_stops() -> Iterator[StopRequests]:
    """In the block, signals are only remembered."""
    stops = StopRequests()

    def note(number: int, _frame: FrameType | None) -> None:
        stops.received.append(signal.Signals(number))

    with _handle(STOP_SIGNALS, note):
        yield stops


class Interrupted(KeyboardInterrupt):
    """Raised by the handler to end the verb; no ``except Exception`` takes it for a bad row."""

    def __init__(self, number: signal.Signals):
        super().__init__(f"ended by {number.name}")
        self.exit_code = EXIT_BY_SIGNAL + number


class Ending(StopRequests):
    """A handler that ends the verb by an exception, and at once on the second Ctrl-C.

    A library may swallow the exception, and a call into C may keep Python from calling the handler.
    The thread of :func:`end_on_signals` covers both; it knows this handler by its class.
    """

    def __init__(self, message: str | None = None, received: list[signal.Signals] | None = None):
        """
        Args:
            message: Message of a stop after which the same command resumes; None where there is
                nothing to resume.
            received: The list of the handler that this one replaces, which sees the signals too.
        """
        super().__init__()
        self.message = message
        self.received = self.received if received is None else received

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number))
        if self.at_once:
            self.end_now(self.received[0])
        if len(self.received) == 1:
            raise_or_hold(self._raise)

    def _raise(self) -> None:
        adopt_orphans()
        raise Interrupted(self.received[0])

    def end_now(self, number: signal.Signals) -> None:
        """End without waiting for the exception to reach the end of the program."""
        if self.message is None:
            end_now(EXIT_BY_SIGNAL + number, f"ended by {number.name}")
        end_now(EXIT_STOPPED, self.message)


@contextmanager
def raise_stops(message: str) -> Iterator[Ending]:
    """In the block, a signal ends what is being done.

    Raises:
        StoppedError: A signal came; with the message that the yielded handler has at that time.
    """
    outer = signal.getsignal(signal.SIGTERM)
    ending = Ending(message, outer.received if isinstance(outer, Ending) else None)
    try:
        with _handle(STOP_SIGNALS, ending):
            yield ending
    except Interrupted:
        raise StoppedError(ending.message) from None
    except Exception as error:
        # A signal to the whole group also ends a worker, whose end may be noticed first.
        if ending.received and not isinstance(error, StoppedError):
            raise StoppedError(ending.message) from error
        raise


def end_on_signals() -> Ending:
    """Install the program's handlers: ``END_SIGNALS`` end it within seconds, whatever it does.

    A thread enforces that. The interpreter's handler in C tells it of a signal through a pipe; it
    acts only where Python's handler is an :class:`Ending`, and leaves those that remember signals
    alone.
    """
    ending = Ending()
    read, write = os.pipe()
    os.set_blocking(write, False)
    for number in without_ignored(END_SIGNALS):
        signal.signal(number, ending)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), name="signals", daemon=True).start()
    return ending


def received_stop() -> signal.Signals | None:
    """Return the first signal that the present handler received."""
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(handler, Ending) and handler.received:
        return handler.received[0]
    return None


def _watch(read: int) -> None:
    """Read signals from the wakeup pipe, in a thread, and end the process after a deadline."""
    received: list[signal.Signals] = []
    deadline = 0.0
    while True:
        timeout = max(0.0, deadline - time.monotonic()) if received else None
        ready, _, _ = select.select([read], [], [], timeout)
        if ready:
            # A signal starts the countdown; the second Ctrl-C ends it.
            number = signal.Signals(os.read(read, 1)[0])
            if not isinstance(signal.getsignal(number), Ending):
                continue
            if not received:
                deadline = time.monotonic() + END_SECONDS
            received.append(number)
            if received.count(signal.SIGINT) > 1:
                deadline = 0.0
        else:
            # Another handler may have been installed since.
            handler = signal.getsignal(received[0])
            if isinstance(handler, Ending):
                handler.end_now(received[0])
            received = []


@contextmanager
def _handle(numbers: Sequence[signal.Signals], handler: signal._HANDLER) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in without_ignored(numbers)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
