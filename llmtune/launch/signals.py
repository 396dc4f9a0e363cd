"""Signals that ask for an end: remembered while ranks can save, an exception where there is nothing to save."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from llmtune.errors import StoppedError
from llmtune.process import STOP_SIGNALS


class StopRequests:
    """The signals that came, in order."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []

    @property
    def at_once(self) -> bool:
        """Whether Ctrl-C was pressed twice. Slurm sends SIGTERM after SIGUSR1: that must not cut a save off."""
        return self.received.count(signal.SIGINT) > 1


@contextmanager
def remember_stops() -> Iterator[StopRequests]:
    """In the block, signals are only noted."""
    stops = StopRequests()

    def note(number: int, _frame: FrameType | None) -> None:
        stops.received.append(signal.Signals(number))

    with _handle(STOP_SIGNALS, note):
        yield stops


@contextmanager
def raise_stops(message: str, numbers: Sequence[signal.Signals] = STOP_SIGNALS) -> Iterator[None]:
    """In the block, a signal ends what is being done.

    Raises:
        StoppedError: With ``message``, where a signal came.
    """

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise _Interrupt

    try:
        with _handle(numbers, interrupt):
            yield
    except _Interrupt:
        raise StoppedError(message) from None


class _Interrupt(BaseException):
    """On its way from the handler to the end of the block; no ``except Exception`` may take it for a bad row."""


@contextmanager
def _handle(numbers: Sequence[signal.Signals], handler: signal._HANDLER) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
