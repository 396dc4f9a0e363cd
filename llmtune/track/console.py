"""The user's terminal: lines, tables, the page before step 1, and one progress line."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import psutil
from rich.console import Console as RichConsole
from rich.table import Table

from llmtune.security.terminal import to_terminal
from llmtune.track.tracker import Outcome, Record
from llmtune.units import format_bytes, format_seconds

#: Seconds between progress lines where the output is no terminal.
PLAIN_INTERVAL_SECONDS = 6.0
#: Seconds between progress lines on a terminal.
TERMINAL_INTERVAL_SECONDS = 0.2


def _process_start() -> float:
    """Return the ``time.monotonic()`` at which this process began.

    On a busy machine the imports before the first console take seconds, which are silence too.
    """
    age_seconds = time.time() - psutil.Process().create_time()
    return time.monotonic() - max(0.0, age_seconds)


#: The ``time.monotonic()`` of this process's last line, on whatever console; at first of its start.
_last_said = _process_start()


class Console:
    """Writes to the user's terminal, which the libraries' output does not reach.

    Secrets and control characters are removed from each text before it is laid out: in a finished
    table a secret may be broken over lines, and colors are control characters.
    """

    def __init__(self, stream: IO[str] | None):
        """
        Args:
            stream: The terminal; None on all ranks but the first, which are silent.
        """
        self.is_heard = stream is not None
        """True if there is a terminal to write to."""
        # Lives as long as the process.
        opened = stream or Path(os.devnull).open("w")  # noqa: SIM115
        self._out = cast("IO[str]", _LastingStream(opened))
        self._rich = RichConsole(file=self._out, highlight=False, soft_wrap=True)
        self._line_open = self._line_passes = False
        # Other threads show their status in between. Reentrant, since a signal's handler may write
        # while the main thread does.
        self._lock = threading.RLock()
        self.said_at = _last_said
        """The ``time.monotonic()`` of the last line."""
        self.watched_by: list[object] = []
        """Those that show what is being done while nothing is written; the last one speaks."""

    @property
    def is_terminal(self) -> bool:
        """Tell whether a line can be overwritten."""
        return self._rich.is_terminal

    @property
    def interval_seconds(self) -> float:
        """Return the seconds between two lines about how far something is."""
        return TERMINAL_INTERVAL_SECONDS if self.is_terminal else PLAIN_INTERVAL_SECONDS

    def say(self, text: str) -> None:
        """Write a line or a paragraph."""
        with self._writing():
            self._close_line()
            self._rich.print(to_terminal(text), markup=False)

    def page(self, title: str, rows: dict[str, str]) -> None:
        """Write a title, and a list of names and values."""
        width = max(map(len, rows), default=0)
        with self._writing():
            self._close_line()
            self._rich.print(f"\n{to_terminal(title)}", style="bold", markup=False)
            for name, value in rows.items():
                self._rich.print(f"  {name:<{width}}  {to_terminal(value)}", markup=False)
            self._rich.print()

    def table(self, title: str, header: list[str], rows: list[list[str]]) -> None:
        """Write a table; its columns share the width."""
        table = Table(
            title=to_terminal(title), show_lines=True, width=None if self.is_terminal else 120
        )
        for name in header:
            table.add_column(name, ratio=1, overflow="fold")
        for row in rows:
            table.add_row(*(to_terminal(cell).replace("[", r"\[") for cell in row))
        with self._writing():
            self._close_line()
            RichConsole(file=self._out, width=None if self.is_terminal else 120).print(table)

    def progress(self, text: str, passing: bool = False) -> None:
        """Show the progress line: it replaces the last one on a terminal, and is new elsewhere.

        Args:
            passing: On a terminal, remove it as soon as another line is written.
        """
        with self._writing():
            if self.is_terminal:
                self._out.write(f"\r\x1b[2K{to_terminal(text)}")
                self._out.flush()
                self._line_open, self._line_passes = True, passing
            else:
                self.say(text)

    def clear_passing(self) -> None:
        """Remove a passing progress line from a terminal."""
        with self._writing():
            if self._line_passes:
                self._close_line()
                self._out.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        global _last_said
        with self._lock:
            yield
            _last_said = time.monotonic()
            self.said_at = _last_said

    def _close_line(self) -> None:
        if self._line_open:
            self._out.write("\r\x1b[2K" if self._line_passes else "\n")
            self._line_open = self._line_passes = False


class _LastingStream:
    """A stream that ignores a closed pipe, so that the run can still save.

    In ``llmtune | tee log``, Ctrl-C ends ``tee`` first.
    """

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write to the stream, or to nowhere once its reader is gone."""
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """Flush the stream, if it still has a reader."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        # The rest of the buffer goes to /dev/null too.
        void = os.open(os.devnull, os.O_WRONLY)
        os.dup2(void, self._stream.fileno())
        os.close(void)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def bar(share: float, width: int = 20) -> str:
    """Draw a share, 0 to 1, with letters."""
    done = round(min(max(share, 0.0), 1.0) * width)
    return "#" * done + "." * (width - done)


class ProgressLine:
    """Shows step, loss, speed, time left and memory of a run."""

    def __init__(self, console: Console, total_steps: int):
        self._console = console
        self._total = total_steps
        # Time and step of the first record. What came before it, such as the first evaluation,
        # happens once, and says nothing about the speed.
        self._first: tuple[float, int] | None = None
        self._shown = float("-inf")
        self._logged = time.monotonic()

    def log(self, record: Record) -> None:
        """Show a training record from time to time, and every evaluation."""
        if "eval_loss" in record:
            self._console.say(
                f"step {record['step']}/{self._total}  {_describe_evaluation(record)}"
            )
            return
        now = time.monotonic()
        self._first = self._first or (now, record["step"])
        last = record["step"] >= self._total
        # The next record may come too late.
        next_at = now + (now - self._logged)
        self._logged = now
        is_due = next_at - self._shown >= PLAIN_INTERVAL_SECONDS
        if not (self._console.is_terminal or last or is_due):
            return
        self._shown = now
        left = self._time_left(now, record["step"])
        done = f"{bar(record['step'] / self._total)}  " if self._console.is_terminal else ""
        self._console.progress(
            f"{done}step {record['step']}/{self._total}  loss {record['loss']:.4f} "
            f" {record['tokens_per_second']:.0f} tokens/s  ETA {left}  memory"
            f" {format_bytes(record['memory_bytes'])}"
        )

    def _time_left(self, now: float, step: int) -> str:
        assert self._first is not None
        began, first = self._first
        if step == first and step < self._total:
            return "-"
        return format_seconds((now - began) / max(step - first, 1) * (self._total - step))

    def finish(self, _outcome: Outcome) -> None:
        """Do nothing: there is nothing to close."""


def _describe_evaluation(record: Record) -> str:
    """Describe the loss and the metrics of an evaluation."""
    parts = [f"held-out loss {record['eval_loss']:.4f}"]
    for key, value in record.items():
        if key.startswith("eval_") and key != "eval_loss":
            digits = 2 if key == "eval_perplexity" else 4
            parts.append(f"{key.removeprefix('eval_').replace('_', ' ')} {value:.{digits}f}")
    return "  ".join(parts)
