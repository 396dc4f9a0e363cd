"""SIGINT, SIGTERM and SIGHUP at any moment of any verb: trials; ``python -m tests.faults.interrupts
FILE`` makes their table.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llmtune.errors import EXIT_STOPPED
from tests.faults.harness import GRACE_SECONDS, alive
from tests.processes import MARK
from tests.support import ROOT

MOMENTS = 30
#: Signal, how often, to whom.
WAYS = [
    (number, times, target)
    for number in (signal.SIGINT, signal.SIGTERM)
    for times in (1, 2)
    for target in ("group", "main process")
]
# The end of a terminal, which comes once.
WAYS += [(signal.SIGHUP, 1, "group"), (signal.SIGHUP, 1, "main process")]
#: Of the second signal behind the first.
BETWEEN_SECONDS = 0.2
#: "In seconds": what the program gives itself, and what a busy machine adds.
END_SECONDS = 10.0
HANG_SECONDS = 60.0
#: Between the end of a verb's work and that of its process, on a busy machine.
ENDING_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Interrupt:
    """One trial: what is done, and when it is interrupted how."""

    verb: str
    moment: float
    """Share of the time that the verb takes when nobody disturbs it."""
    number: signal.Signals
    times: int
    target: str

    @property
    def name(self) -> str:
        """For people."""
        often = "once" if self.times == 1 else "twice"
        return f"{self.verb} at {self.moment:.0%}, {self.number.name} {often} to the {self.target}"


@dataclass(kw_only=True)
class Outcome:
    """What came of it."""

    code: int
    """As a shell gives it: 128 and the signal for a process that died of one."""
    seconds: float
    """From the last signal to the end of the main process."""
    left: int
    """Processes, a few seconds later."""
    over: bool
    """It had ended before the signal."""
    console: str


def draw_interrupts(verbs: Sequence[str]) -> list[Interrupt]:
    """Thirty moments a verb, evenly over its time, and each of the ten ways three times, in another
    order for each.
    """
    trials = []
    for place, verb in enumerate(verbs):
        for index in range(MOMENTS):
            number, times, target = WAYS[(3 * index + place) % len(WAYS)]
            moment = (index + 0.5) / MOMENTS
            trials.append(
                Interrupt(verb=verb, moment=moment, number=number, times=times, target=target)
            )
    return trials


def run_interrupted(
    arguments: Sequence[str],
    folder: Path,
    trial: Interrupt,
    wait: Callable[[Path, subprocess.Popen[bytes]], None],
) -> Outcome:
    """The program in a session of its own, signaled when ``wait(console, process)`` returns;
    nothing is left of it.
    """
    mark, console = uuid.uuid4().hex, folder / "console.txt"
    with console.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "llmtune", *arguments],
            cwd=ROOT,
            env={**os.environ, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        wait(console, process)
        over = process.poll() is not None
        for number in range(trial.times):
            time.sleep(BETWEEN_SECONDS if number else 0)
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if trial.target == "group" else os.kill)(process.pid, trial.number)
        sent = time.monotonic()
        code = process.wait(HANG_SECONDS)
        seconds = time.monotonic() - sent
        deadline = time.monotonic() + GRACE_SECONDS
        while (left := alive(mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        for pid in alive(mark):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        process.wait(HANG_SECONDS)
    code = 128 - code if code < 0 else code
    return Outcome(
        code=code,
        seconds=round(seconds, 2),
        left=len(left),
        over=over,
        console=console.read_text(errors="replace"),
    )


def judge_interrupt(trial: Interrupt, outcome: Outcome, undisturbed: int) -> list[str]:
    """What is wrong with it; ``undisturbed`` is the exit code of the verb when it is left alone."""
    by_signal = 128 + trial.number
    allowed = {EXIT_STOPPED if trial.verb == "train" else by_signal}
    if trial.verb == "predict":
        # Its libraries are imported before there is anything to go on with.
        allowed.add(EXIT_STOPPED)
    if (
        trial.verb == "train"
        and "Traceback" not in outcome.console
        and outcome.console.strip() in ("", _said(trial))
    ):
        # Before preparation: the program itself was only being loaded.
        allowed.add(by_signal)
    # It may have done its work, and be about to end: times differ from trial to trial.
    was_ending = outcome.code == undisturbed and outcome.seconds < ENDING_SECONDS
    if outcome.over or was_ending or trial.moment > 1 - 2 / MOMENTS:
        allowed |= {undisturbed, by_signal}
    problems = []
    if outcome.code not in allowed:
        problems.append(f"exit code {outcome.code}")
    if outcome.seconds > END_SECONDS:
        problems.append(f"ended after {outcome.seconds} s")
    if outcome.left:
        problems.append(f"{outcome.left} processes are left")
    return problems


def _said(trial: Interrupt) -> str:
    return f"ended by {trial.number.name}"


def record(file: Path, trial: Interrupt, outcome: Outcome, wrong: list[str]) -> None:
    """One line for the table, so that no cut session loses any."""
    line = {**asdict(trial), "number": trial.number.name, **asdict(outcome), "wrong": wrong}
    with file.open("a") as out:
        out.write(json.dumps(line) + "\n")


def render_table(lines: list[dict[str, object]]) -> str:
    """Markdown: one line a verb and way, with its moments."""
    head = "| verb | signal | to | moment: exit code, seconds | processes left | wrong |"
    rows = [head, "| --- | --- | --- | --- | --- | --- |"]
    cells: dict[tuple[str, str, str], list[dict[str, object]]] = {}
    for line in lines:
        often = "" if line["times"] == 1 else " twice"
        cells.setdefault(
            (str(line["verb"]), f"{line['number']}{often}", str(line["target"])), []
        ).append(line)
    for key, trials in cells.items():
        at = "; ".join(
            f"{float(str(t['moment'])):.0%}: {t['code']}, {float(str(t['seconds'])):.1f}"
            + (" (had ended)" if t["over"] else "")
            for t in trials
        )
        left = sum(int(str(t["left"])) for t in trials)
        rows.append(
            f"| {' | '.join(key)} | {at} | {left} | {sum(bool(t['wrong']) for t in trials)} |"
        )
    return "\n".join(rows)


def read_lines(file: Path) -> list[dict[str, object]]:
    """The last record of every trial: one that was run again counts as it came out then."""
    found = {}
    for text in file.read_text().splitlines():
        line = json.loads(text)
        found[line["verb"], line["moment"]] = line
    return sorted(
        found.values(),
        key=lambda line: (line["verb"], line["number"], line["times"], line["target"]),
    )


def main(file: Path) -> None:
    """Print the table."""
    lines = read_lines(file)
    longest = max(float(str(line["seconds"])) for line in lines)
    print(f"{len(lines)} trials, the longest end {longest:.1f} s\n\n{render_table(lines)}")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
