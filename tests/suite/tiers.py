"""Three tiers of tests: fast ones start no process, ``process`` marks those that do, ``slow`` those
of the long table.

Without ``-m``, slow tests are left out. A test that starts a process without the marker fails, so
that ``scripts/test.sh --fast`` stays what it says.
"""

from __future__ import annotations

import multiprocessing.process
import sys
from collections.abc import Generator, Iterator
from typing import Any

import pytest

_STARTS = {
    "subprocess.Popen",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.system",
    "llmtune.multiprocessing",
}
#: Programs that libraries ask about the machine, once a process.
_QUESTIONS = (
    "ldconfig",
    "uname",
    "lscpu",
    "gcc",
    "/sbin/ldconfig",
    "ld",
    "c++",
    "which",
    "git",
    "file",
    "fc-list",
)

_started: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Listen to what starts processes."""

    def listen(event: str, arguments: Any) -> None:
        if event in _STARTS:
            program = str(arguments[0]) if arguments else event
            if program.rpartition("/")[2] not in _QUESTIONS:
                _started.append(f"{event}: {program}")

    sys.addaudithook(listen)
    start = multiprocessing.process.BaseProcess.start

    def start_heard(self: Any) -> None:
        sys.audit("llmtune.multiprocessing")
        start(self)

    multiprocessing.process.BaseProcess.start = start_heard  # type: ignore[method-assign]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the slow tier out unless it was asked for by its marker; give those that start
    processes their nursery.
    """
    for item in items:
        if item.get_closest_marker("process") and isinstance(item, pytest.Function):
            item.fixturenames.insert(0, "nursery")
    if "slow" in str(config.getoption("markexpr")):
        return
    left_out = [item for item in items if item.get_closest_marker("slow")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Forget what earlier tests have started."""
    _started.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, Any]:
    """A test of the fast tier starts no process, nor does a fixture that it is the first to use."""
    report: Any = yield
    if call.when == "teardown" and _started and not item.get_closest_marker("process"):
        report.outcome = "failed"
        report.longrepr = f"starts a process ({_started[0]}): mark it with pytest.mark.process"
    return report
