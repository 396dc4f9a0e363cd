"""The ordinary suite has a budget of time, and so has each test, measured in the speed of the
machine that it runs on.

The machine's speed is that of a short calculation on two cores, before the first test and after the
last, against what it takes on a quiet machine with two cores of 2026. A slow or busy machine gets
more time, a fast one no less. The calculation is also made now and then while tests run, since a
machine that others use is slow for minutes. Where tests run side by side, each has the speed that
they leave it. The suite's own budget knows no such excuse: of the slowness between tests, what is
more than the share that they take themselves counts.

What is over its limit is listed. In CI (``CI`` is set) a test that is over it fails the run, and so
does a whole tier, or what several tests share, that is over it by half.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Any

import pytest

#: Seconds of a whole tier on two quiet cores, and the time at which it began, as
#: ``scripts/test.sh`` sets them.
SUITE_BUDGET = "LLMTUNE_SUITE_BUDGET"
#: Beyond its budget by more than this, a suite fails in CI, and so does a fixture.
TOLERANCE = 1.5
#: Of one test, and of the set-up of what it shares with others, unless it is marked ``slow``.
TEST_SECONDS = 20.0
#: Printed at the end.
SLOWEST = 15
#: Seconds between two looks at the speed that tests leave each other.
LOOK_SECONDS = 60.0
#: How many times as long the calculation takes beside as many busy tests as there are cores.
OWN_SHARE = 2.0

_LOOP = (
    "import time; t = time.perf_counter(); sum(i * i % 7 for i in range(6_000_000));"
    " print(time.perf_counter() - t)"
)
#: The loop's on each of two cores at the same time: AMD EPYC, Python 3.11, 2026-11-25.
_REFERENCE_SECONDS = 0.26


def calibrate() -> float:
    """How many times as long as on the reference machine a calculation takes here and now, on two
    cores; 1 at least.
    """
    command = [sys.executable, "-S", "-E", "-c", _LOOP]
    loops = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    seconds = max(float(loop.communicate()[0]) for loop in loops)
    return max(1.0, seconds / _REFERENCE_SECONDS)


class Budget:
    """Seconds of every test of this session, its set-up apart."""

    def __init__(self, suite: tuple[float, float] | None, side_by_side: bool = False):
        """
        Args:
            suite: Seconds of the whole tier, and when it began; None where a part of it runs.
            side_by_side: Whether several tests run at a time.
        """
        self.suite = suite
        self.side_by_side = side_by_side
        self.found: list[str] = []
        self.is_fatal = False
        self.started = time.monotonic()
        self.scale = calibrate()
        self.looked = time.monotonic()
        self.beside: list[float] = []
        self.seconds: dict[str, float] = {}
        self.tests: set[str] = set()
        self.slow: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of a test; what a fixture of several tests takes counts for the set-up of the
        first of them.
        """
        name = report.nodeid if report.when == "call" else f"{report.nodeid} ({report.when})"
        self.seconds[name] = report.duration
        self.tests.add(report.nodeid)
        if "slow" in report.keywords:
            self.slow.add(name)
        if self.side_by_side and time.monotonic() - self.looked > LOOK_SECONDS:
            self.beside.append(calibrate())
            self.looked = time.monotonic()

    def judge(self) -> list[str]:
        """What takes longer than it may."""
        beside = statistics.median(self.beside or [1.0])
        scale = max(self.scale, calibrate(), beside / OWN_SHARE)
        limit = TEST_SECONDS * max(scale, beside)
        found = [
            f"{seconds:.1f} s of {limit:.1f} s: {test} (make it shorter, or mark it slow)"
            for test, seconds in sorted(self.seconds.items(), key=lambda pair: -pair[1])
            if seconds > limit and test not in self.slow
        ]
        judged = {test: seconds for test, seconds in self.seconds.items() if test not in self.slow}
        self.is_fatal = any(
            seconds > (limit if test in self.tests else limit * TOLERANCE)
            for test, seconds in judged.items()
        )
        if self.suite is not None:
            budget, elapsed = self.suite[0] * scale, time.time() - self.suite[1]
            if elapsed > budget * TOLERANCE:
                self.is_fatal = True
                found.insert(0, f"the suite took {elapsed:.0f} s; its budget is {budget:.0f} s")
        self.scale = scale
        return found


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Only where results are collected: not in the workers of xdist, nor where tests are only
    listed.
    """
    if hasattr(config, "workerinput") or config.getoption("collectonly"):
        return
    given = os.environ.get(SUITE_BUDGET, "").split()
    suite = (float(given[0]), float(given[1])) if len(given) == 2 else None
    workers = getattr(config.option, "numprocesses", None) or 1
    config.pluginmanager.register(Budget(suite, workers > 1), "llmtune-budget")


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Any:
    """Fail in CI where something takes too long."""
    result = yield
    budget = session.config.pluginmanager.get_plugin("llmtune-budget")
    if budget is not None and budget.seconds:
        budget.found = budget.judge()
        if budget.is_fatal and os.environ.get("CI") and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    return result


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The slowest tests, the total, and what is over its limit."""
    budget = config.pluginmanager.get_plugin("llmtune-budget")
    if budget is None or not budget.seconds:
        return
    title = f"{len(budget.tests)} tests in {time.monotonic() - budget.started:.0f} s"
    if budget.suite is not None:
        title += f", {time.time() - budget.suite[1]:.0f} s since the suite began"
    terminalreporter.section(f"{title}; this machine takes {budget.scale:.2f} x as long")
    for test, seconds in sorted(budget.seconds.items(), key=lambda pair: -pair[1])[:SLOWEST]:
        terminalreporter.write_line(f"{seconds:8.1f} s  {test}")
    for problem in budget.found:
        terminalreporter.write_line(f"over its limit: {problem}", red=True)
