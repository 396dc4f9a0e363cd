"""Signals that ask for an end: remembered while ranks can save, an end where there is nothing to
save.
"""

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
from llmtune.launch.supervise.ending import adopt_orphans, end_now
from llmtune.process import END_SIGNALS, STOP_SIGNALS, raise_or_hold, without_ignored

#: For the clean-up behind an interrupted verb; what is still there then is ended.
END_SECONDS = 5.0

#: What a stop means before there is anything to save.
NOT_BEGUN = "stopped before training began; nothing is lost, the same command starts again"
#: What a stop means when there is nothing to train any more.
NOT_EXPORTED = (
    "stopped during the export; the model is trained, and the same command goes on with the export"
)


class StopRequests:
    """The signals that came, in order."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []

    @property
    def at_once(self) -> bool:
        """Whether Ctrl-C was pressed twice.

        Slurm sends SIGTERM after SIGUSR1: that must not cut a save off.
        """
        return self.received.count(signal.SIGINT) > 1


@contextmanager
def remember_stops() -> Iterator[StopRequests]:
    """In the block, signals are only noted."""
    stops = StopRequests()

    def note(number: int, _frame: FrameType | None) -> None:
        stops.received.append(signal.Signals(number))

    with _handle(STOP_SIGNALS, note):
        yield stops


class Interrupted(KeyboardInterrupt):
    """On its way from the handler to the end of the verb; no ``except Exception`` may take it for a
    bad row.
    """

    def __init__(self, number: signal.Signals):
        super().__init__(f"ended by {number.name}")
        self.exit_code = EXIT_BY_SIGNAL + number


class Ending(StopRequests):
    """A handler that ends what is being done: by an exception, and at the second Ctrl-C at once.

    A library may swallow the exception, and a call into C may keep Python from calling the handler:
    that is for the thread of :func:`end_on_signals`, which knows this handler by its class.
    """

    def __init__(self, message: str | None = None, received: list[signal.Signals] | None = None):
        """
        Args:
            message: What a stop means here, where the same command goes on; None where there is
                nothing to go on with.
            received: The list of the handler in whose place this one is put, which is to know as
                well.
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
        """Do not wait for the exception to get to the end of the program."""
        if self.message is None:
            end_now(EXIT_BY_SIGNAL + number, f"ended by {number.name}")
        end_now(EXIT_STOPPED, self.message)


@contextmanager
def raise_stops(message: str) -> Iterator[Ending]:
    """In the block, a signal ends what is being done.

    Raises:
        StoppedError: With the ``message`` that the yielded handler has then, where a signal came.
    """
    outer = signal.getsignal(signal.SIGTERM)
    ending = Ending(message, outer.received if isinstance(outer, Ending) else None)
    try:
        with _handle(STOP_SIGNALS, ending):
            yield ending
    except Interrupted:
        raise StoppedError(ending.message) from None
    except Exception as error:
        # Sent to the whole group, the signal has ended a worker too, and its end was noticed first.
        if ending.received and not isinstance(error, StoppedError):
            raise StoppedError(ending.message) from error
        raise


def end_on_signals() -> Ending:
    """The handlers of the program, for its whole life: those of ``END_SIGNALS`` end it in seconds,
    wherever it stands.

    A thread sees to that. It hears of a signal from the interpreter's own handler in C, and looks
    which handler Python has for it now: those that remember signals are left alone.
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
    """The first signal that the present handler knows of."""
    handler = signal.getsignal(signal.SIGTERM)
    return handler.received[0] if isinstance(handler, Ending) and handler.received else None


def _watch(read: int) -> None:
    came: list[signal.Signals] = []
    deadline = 0.0
    while True:
        ready, _, _ = select.select(
            [read], [], [], max(0.0, deadline - time.monotonic()) if came else None
        )
        if ready:
            number = signal.Signals(os.read(read, 1)[0])
            if isinstance(signal.getsignal(number), Ending):
                deadline = deadline if came else time.monotonic() + END_SECONDS
                came.append(number)
                if came.count(signal.SIGINT) > 1:
                    deadline = 0.0
        else:
            # Python may have called the handler after another was put in its place.
            handler = signal.getsignal(came[0])
            if isinstance(handler, Ending):
                handler.end_now(came[0])
            came = []


@contextmanager
def _handle(numbers: Sequence[signal.Signals], handler: signal._HANDLER) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in without_ignored(numbers)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
