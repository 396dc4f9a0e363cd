"""The guards of the suite themselves: what is too slow or starts a process without saying so is
found.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from tests.suite import budget
from tests.suite.budget import Budget
from tests.support import ROOT


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A machine whose speed a test decides."""
    scale = [1.0]
    monkeypatch.setattr(budget, "calibrate", lambda: scale[0])
    return scale


def report(name: str, seconds: float, when: str = "call", slow: bool = False) -> Any:
    return SimpleNamespace(
        nodeid=name, duration=seconds, when=when, keywords={"slow": 1} if slow else {}
    )


def test_a_test_over_its_limit_is_named_unless_it_is_marked(calm: list[float]) -> None:
    watched = Budget(None)
    for given in (
        report("a", 19.9),
        report("b", 20.1),
        report("c", 99, slow=True),
        report("d", 25, "setup"),
    ):
        watched.pytest_runtest_logreport(given)
    assert [problem.split(": ")[1].split(" (make")[0] for problem in watched.judge()] == [
        "d (setup)",
        "b",
    ]
    was_fatal = watched.is_fatal
    assert was_fatal
    calm[0] = 1.5
    assert watched.judge() == [], "a slow machine has more time"
    assert not watched.is_fatal
    calm[0] = 1.0
    for seconds, fatal in ((29.9, False), (30.1, True)):
        shared = Budget(None)
        shared.pytest_runtest_logreport(report("e", seconds, "setup"))
        assert (len(shared.judge()), shared.is_fatal) == (1, fatal)


def test_tests_that_run_side_by_side_have_the_speed_that_they_leave_each_other(
    calm: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "LOOK_SECONDS", 0.0)
    watched = Budget((900, time.time() - 1360), side_by_side=True)
    calm[0] = 1.5
    for given in (report("a", 29.9), report("b", 30.1), report("c", 1)):
        watched.pytest_runtest_logreport(given)
    calm[0] = 1.0
    suite, slow = watched.judge()
    assert suite.startswith("the suite took"), "they are no excuse for the suite"
    assert "30.1 s of 30.0 s: b" in slow


def test_a_machine_that_is_slow_only_in_between_gives_the_suite_more_time(
    calm: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "LOOK_SECONDS", 0.0)
    for beside, found in ((2.0, 1), (4.0, 0)):
        calm[0] = 1.0
        watched = Budget((900, time.time() - 1360), side_by_side=True)
        calm[0] = beside
        watched.pytest_runtest_logreport(report("a", 1))
        calm[0] = 1.0
        assert len(watched.judge()) == found, beside


def test_a_suite_may_take_half_as_long_again(calm: list[float]) -> None:
    assert Budget((900, time.time() - 1340)).judge() == []
    (problem,) = Budget((900, time.time() - 1360)).judge()
    assert problem == "the suite took 1360 s; its budget is 900 s"
    calm[0] = 2.0
    assert Budget((900, time.time() - 1360)).judge() == []


_INNER = """
import subprocess, sys, multiprocessing, pytest
def test_quiet(): pass
def test_loud(): subprocess.run([sys.executable, "--version"])
def test_worker(): multiprocessing.get_context("spawn").Process(target=print).start()
@pytest.fixture(scope="module")
def shared(): subprocess.run([sys.executable, "--version"])
def test_by_fixture(shared): pass
@pytest.mark.process
def test_marked(): subprocess.run([sys.executable, "--version"])
"""


@pytest.mark.process
def test_a_test_that_starts_a_process_must_say_so(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeconftest(
        "pytest_plugins = ['tests.suite.tiers']\n"
        "import pytest\n"
        "@pytest.fixture\n"
        "def nursery(): pass\n"
        "def pytest_configure(config): config.addinivalue_line('markers', 'process: starts one')\n"
    )
    pytester.makepyfile(_INNER)
    done = pytester.runpytest_subprocess("-p", "no:xdist")
    done.assert_outcomes(passed=5, errors=3)
    done.stdout.fnmatch_lines(
        ["*test_loud*", "*starts a process (subprocess.Popen*mark it with pytest.mark.process*"]
    )
    for name in ("test_worker", "test_by_fixture"):
        done.stdout.fnmatch_lines([f"ERROR *{name}*"])
