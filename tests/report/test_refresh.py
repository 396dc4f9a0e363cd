"""Reports are written beside a run: seldom, one at a time, and a run neither waits nor fails."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from llmtune.report import refresh
from llmtune.report.refresh import ReportRefresher, write_last_report
from llmtune.track.tracker import Outcome, Record, check_tracker
from tests.report.run_folder import make_run
from tests.support import Finished
from tests.support import run as run_command

#: A program in the place of the one that writes the page.
APPEND = "import sys; open(sys.argv[1], 'a').write('x')"
FAIL = "import sys; sys.stderr.write('one line\\nDiskFull: no room\\n'); sys.exit(1)"
HANG = "import sys, time; open(sys.argv[1], 'a').write('x'); time.sleep(60)"

EVALUATION: Record = {"step": 4, "eval_loss": 1.0}
SAVE: Record = {"step": 5, "loss": 1.0, "save_pause_seconds": 0.1}
STEP: Record = {"step": 6, "loss": 1.0}


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def replace(program: str) -> None:
        monkeypatch.setattr(
            refresh, "_command", lambda run, _cache: [sys.executable, "-c", program, str(run)]
        )

    return replace


def wait_until(is_true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)


def count(file: Path) -> int:
    return len(file.read_text()) if file.exists() else 0


@pytest.mark.process
def test_evaluations_and_saves_write_one_and_steps_none(
    tmp_path: Path, lines: list[str], use: Callable[[str], None]
) -> None:
    use(APPEND)
    file = tmp_path / "file"
    refresher = ReportRefresher(file, tmp_path, lines.append, least_seconds=0.0)
    check_tracker(refresher)
    for number, record in enumerate((EVALUATION, SAVE)):
        refresher.log(record)
        wait_until(lambda number=number: count(file) == number + 1)  # type: ignore[misc]
    refresher.log(STEP)
    time.sleep(0.3)
    assert count(file) == 2
    refresher.finish(Outcome.finished)
    refresher._thread.join(30)
    assert not refresher._thread.is_alive()
    assert lines == []


@pytest.mark.process
def test_many_evaluations_write_one_page_until_the_time_is_over(
    tmp_path: Path, lines: list[str], use: Callable[[str], None]
) -> None:
    use(APPEND)
    file = tmp_path / "file"
    refresher = ReportRefresher(file, tmp_path, lines.append, least_seconds=30.0)
    refresher.log(EVALUATION)
    wait_until(lambda: count(file) == 1)
    for _ in range(100):
        refresher.log(EVALUATION)
    time.sleep(0.5)
    assert count(file) == 1
    refresher.finish(Outcome.stopped)
    refresher._thread.join(30)
    assert not refresher._thread.is_alive()


@pytest.mark.process
def test_what_fails_is_said_once_and_not_tried_again(
    tmp_path: Path, lines: list[str], use: Callable[[str], None]
) -> None:
    use(FAIL)
    refresher = ReportRefresher(tmp_path / "file", tmp_path, lines.append, least_seconds=0.0)
    refresher.log(EVALUATION)
    refresher._thread.join(60)
    refresher.log(EVALUATION)
    refresher.finish(Outcome.finished)
    assert len(lines) == 1
    assert lines[0].endswith("not tried again: DiskFull: no room")


@pytest.mark.process
def test_a_report_that_hangs_ends_with_the_run(
    tmp_path: Path, lines: list[str], use: Callable[[str], None]
) -> None:
    use(HANG)
    file = tmp_path / "file"
    refresher = ReportRefresher(file, tmp_path, lines.append)
    refresher.log(EVALUATION)
    wait_until(lambda: count(file) == 1)
    began = time.monotonic()
    refresher.finish(Outcome.failed)
    assert time.monotonic() - began < 0.5, "a run does not wait for it"
    refresher._thread.join(30)
    assert not refresher._thread.is_alive()
    write_last_report(file, tmp_path, lines.append, timeout_seconds=1.0)
    assert "was not written within 1 s" in lines[-1]


def test_without_the_libraries_one_line_says_what_to_install(
    tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh, "find_missing", lambda: ["altair", "vl-convert-python"])
    refresher = ReportRefresher(tmp_path, tmp_path, lines.append)
    for record in (EVALUATION, SAVE, STEP):
        refresher.log(record)
    refresher.finish(Outcome.finished)
    assert lines == ["report.html is not written: pip install altair vl-convert-python"]
    write_last_report(tmp_path, tmp_path, lines.append, 1.0)
    assert len(lines) == 2


@pytest.mark.process
def test_a_record_costs_the_training_thread_less_than_half_a_millisecond(
    tmp_path: Path, lines: list[str], use: Callable[[str], None]
) -> None:
    use(APPEND)
    refresher = ReportRefresher(tmp_path / "file", tmp_path, lines.append, least_seconds=0.0)
    costs = []
    for _ in range(200):
        began = time.perf_counter()
        refresher.log(EVALUATION)
        costs.append(time.perf_counter() - began)
        time.sleep(0.001)
    refresher.finish(Outcome.finished)
    assert statistics.median(costs) < 0.0005


@pytest.mark.process
def test_the_program_writes_the_page_or_says_in_one_line_why_not(tmp_path: Path) -> None:
    run, cache = make_run(tmp_path / "run"), tmp_path / "cache"
    # The script takes seconds to make; any text is one.
    import altair

    version = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    name = f"vega-{metadata.version('vl-convert-python')}-{version}.js"
    cache.mkdir(mode=0o700)
    (cache / "report").mkdir()
    (cache / "report" / name).write_text("the script")
    done = run_program(run, cache)
    assert (done.code, done.err) == (0, "")
    page = (run / "report.html").read_text()
    assert "the script" in page
    assert "plain" in page
    done = run_program(tmp_path / "nowhere", cache)
    assert done.code == 1
    assert done.err.count("\n") == 1
    assert "nowhere: no run folder" in done.err


def run_program(folder: Path, cache: Path) -> Finished:
    return run_command([sys.executable, "-m", "llmtune.report.program", str(folder), str(cache)])
