"""Limit the processor time of a chat template, a program of its author that may never end.

Loops are ended at their next instruction. A single operation on huge numbers or texts cannot be
ended; powers, which make such numbers from a few characters, are refused before a template is
compiled.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import jinja2

from llmtune.errors import ConfigError

#: Processor time for one conversation; the templates of published models take milliseconds.
SECONDS = 10.0
_POLL_SECONDS = 0.2
#: Largest exponent of a power in a template.
_MOST_EXPONENT = 64


class _EndlessError(BaseException):
    """Raised in the middle of a template; no ``except Exception`` catches it."""


@dataclass(slots=True, kw_only=True)
class _Render:
    thread: int
    clock: int
    """Clock of the thread's own time: a thread that has to wait for others is not slow."""
    deadline: float
    is_stopped: bool = False


class _RenderWatch:
    """Ends renderings that take too long, in one thread for all of a process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.renders: dict[int, _Render] = {}
        self._thread: threading.Thread | None = None

    def add(self, render: _Render) -> None:
        """Watch a rendering until it is removed."""
        with self.lock:
            self.renders[render.thread] = render
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._poll, name="template-bounds", daemon=True
                )
                self._thread.start()

    def _poll(self) -> None:
        while True:
            time.sleep(_POLL_SECONDS)
            with self.lock:
                for render in list(self.renders.values()):
                    try:
                        is_over = time.clock_gettime(render.clock) > render.deadline
                    except OSError:
                        # The thread has ended.
                        del self.renders[render.thread]
                        continue
                    if is_over:
                        # Again at each poll, in case the template swallowed the previous one.
                        render.is_stopped = True
                        _raise_in(render.thread, _EndlessError)


_watch = _RenderWatch()


def _forget() -> None:
    """Start anew in the child of a fork, which has no other threads."""
    global _watch
    _watch = _RenderWatch()


os.register_at_fork(after_in_child=_forget)


class bounded_template:  # noqa: N801 - a context manager reads as a function
    """In the block, this thread renders or compiles one template. Such blocks do not nest.

    Raises:
        ConfigError: At the end of the block, where it took too long.
    """

    __slots__ = ("_render",)

    def __enter__(self) -> None:
        thread = threading.get_ident()
        clock = time.pthread_getcpuclockid(thread)
        self._render = _Render(
            thread=thread, clock=clock, deadline=time.clock_gettime(clock) + SECONDS
        )
        _watch.add(self._render)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._end()
        except _EndlessError:
            # It was raised between the last line of the block and this one.
            self._end()
        # A template that ended late with an error of its own has that error, not this one.
        is_own_error = kind is not None and not issubclass(kind, _EndlessError)
        if self._render.is_stopped and not is_own_error:
            raise ConfigError(
                f"the chat template has not ended after {SECONDS:g} s of computing, for one"
                " conversation: take another data.chat_template, or fix it"
            ) from None

    def _end(self) -> None:
        with _watch.lock:
            _watch.renders.pop(self._render.thread, None)
            if self._render.is_stopped:
                # Where it is raised already, there is nothing to take back.
                _raise_in(self._render.thread, None)


def refuse_powers(text: str) -> None:
    """Refuse powers such as ``9**9**9``, which Jinja computes when it compiles a template.

    Raises:
        ConfigError: The template has a power of a power, or one with an exponent that is not a
            small number.
    """
    # Here, because it imports torch.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment: Any = _compile_jinja_template("").environment
    try:
        tree = environment.parse(text)
    except jinja2.TemplateError:
        # The error is reported where the template is compiled.
        return
    for power in tree.find_all(jinja2.nodes.Pow):
        exponent = power.right.value if isinstance(power.right, jinja2.nodes.Const) else None
        is_small = isinstance(exponent, int | float) and abs(exponent) <= _MOST_EXPONENT
        if (
            not is_small
            or isinstance(power.left, jinja2.nodes.Pow)
            or power.left.find(jinja2.nodes.Pow)
        ):
            raise ConfigError(
                "the chat template raises to a power without a small exponent, in line"
                f" {power.lineno}: take another data.chat_template, or fix it"
            )


def _raise_in(thread: int, kind: type[BaseException] | None) -> None:
    """Raise an exception in a thread at its next instruction; None takes that back."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(kind) if kind else None
    )
