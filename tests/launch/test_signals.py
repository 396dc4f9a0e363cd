"""A stop is always exit code 75, and only impatience cuts a save off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from llmtune.errors import EXIT_STOPPED, DataError, LlmtuneError, StoppedError
from llmtune.launch.supervise import supervisor
from llmtune.launch.supervise.signals import END_SECONDS, raise_stops
from llmtune.launch.supervise.supervisor import Limits
from llmtune.process import hold_interruptions
from tests.launch.fakes import alive, end_of, run_fakes, start_supervisor, wait_until
from tests.support import ROOT, first, run

SAVES = """
    def save(*_):
        (out / f"saving{rank}").touch()
        time.sleep(float(os.environ.get("SAVE_SECONDS", 0)))
        (out / f"saved{rank}").touch()
        fail(StoppedError("stopped after step 3 and saved"))
    signal.signal(signal.SIGTERM, save)
    ready()
    time.sleep(600)
"""


def saved(folder: Path, what: str = "saved") -> bool:
    return len(list(folder.glob(f"{what}?"))) == 2


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_lets_all_ranks_save(number: signal.Signals, tmp_path: Path) -> None:
    supervisor = start_supervisor(SAVES, tmp_path)
    supervisor.send_signal(number)
    code, out = end_of(supervisor)
    assert code == EXIT_STOPPED
    assert saved(tmp_path)
    assert f"{number.name}: saving after the current step" in out
    assert "stopped after step 3 and saved" in out


@pytest.mark.process
def test_nohup_keeps_a_run_going_without_its_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        supervisor = start_supervisor(SAVES, tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    supervisor.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert supervisor.poll() is None
    assert not saved(tmp_path, "saving")
    supervisor.send_signal(signal.SIGTERM)
    assert end_of(supervisor)[0] == EXIT_STOPPED


@pytest.mark.process
def test_slurms_second_signal_does_not_cut_a_save_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAVE_SECONDS", "1.5")
    supervisor = start_supervisor(SAVES, tmp_path)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        supervisor.send_signal(number)
        time.sleep(0.2)
    assert not saved(tmp_path)
    assert end_of(supervisor)[0] == EXIT_STOPPED
    assert saved(tmp_path)


@pytest.mark.process
def test_ctrl_c_twice_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAVE_SECONDS", "600")
    supervisor = start_supervisor(SAVES, tmp_path)
    supervisor.send_signal(signal.SIGINT)
    assert wait_until(lambda: saved(tmp_path, "saving"))
    assert supervisor.poll() is None
    supervisor.send_signal(signal.SIGINT)
    code, out = end_of(supervisor)
    assert code == EXIT_STOPPED
    assert "without saving" in out
    assert not alive(tmp_path)


@pytest.mark.process
def test_ranks_that_take_too_long_to_save_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAVE_SECONDS", "600")
    supervisor = start_supervisor(SAVES, tmp_path, Limits(stop_timeout=0.5))
    supervisor.send_signal(signal.SIGTERM)
    code, out = end_of(supervisor)
    assert code == EXIT_STOPPED
    assert "not saved: the ranks had not ended 0.5 s after SIGTERM (launch.stop_timeout)" in out
    (stacks,) = tmp_path.glob("stacks-*.txt")
    assert str(stacks) in out
    assert stacks.read_text().count("in save") == 2
    assert not alive(tmp_path)


@pytest.mark.process
@pytest.mark.parametrize(
    "other", ["time.sleep(600)", "time.sleep(0.2); fail(RuntimeError('Connection closed by peer'))"]
)
def test_a_stop_while_ranks_start_is_a_stop(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STOP_GRACE_SECONDS", 0.5)
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 0.5)
    monkeypatch.setenv("OUT", str(tmp_path))
    # Rank 0 has no handler yet and dies of the signal; rank 1 waits for it, or loses it.
    body = f"""
        if rank == 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while not (out / "0.pid").exists():
                time.sleep(0.01)
            os.kill(os.getppid(), signal.SIGTERM)
            {other}
        ready()
        time.sleep(600)
    """
    with pytest.raises(StoppedError, match="while the ranks were starting; nothing is lost"):
        run_fakes(body, tmp_path)


@pytest.mark.process
def test_a_rank_that_stops_by_itself_does_not_leave_the_others_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "STOP_GRACE_SECONDS", 0.3)
    with pytest.raises(StoppedError):
        run_fakes("time.sleep(600) if rank else os._exit(75)")


@pytest.mark.process
def test_an_error_with_advice_is_told_also_after_a_signal() -> None:
    body = """
        signal.signal(signal.SIGTERM, lambda *_: fail(DataError("disk full") if rank else StoppedError("stopped")))
        meet()
        if rank == 1:
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(600)
    """  # noqa: E501
    with pytest.raises(DataError, match="disk full"):
        run_fakes(body)


@pytest.mark.process
def test_a_failure_after_a_signal_is_a_stop_and_no_reason_to_start_again() -> None:
    body = """
        signal.signal(signal.SIGTERM, lambda *_: fail(ZeroDivisionError("no")))
        meet()
        if rank == 1:
            os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(600)
    """
    with pytest.raises(
        StoppedError,
        match="SIGTERM came, but nothing was saved after it: rank [01]: ZeroDivisionError",
    ):
        run_fakes(body)


@pytest.mark.process
def test_a_signal_in_the_last_moment_leaves_the_rest_to_the_next_start() -> None:
    with pytest.raises(StoppedError, match="training was done"):
        run_fakes("""
            signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
            meet()
            if rank == 1:
                os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(600)
        """)


def work_until(number: signal.Signals) -> None:
    """Work that takes every error for one of its own."""
    try:
        os.kill(os.getpid(), number)
        time.sleep(10)
    except Exception:
        pytest.fail("taken for an error of the work")


def test_where_there_is_nothing_to_save_a_signal_ends_the_work_with_a_message() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(StoppedError, match="^nothing lost$"), raise_stops("nothing lost"):
        work_until(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_where_cpp_calls_python_a_stop_waits_for_the_end_of_the_call() -> None:
    reached = []

    def work() -> None:
        with raise_stops("nothing is lost"):
            with hold_interruptions():
                os.kill(os.getpid(), signal.SIGTERM)
                with hold_interruptions():
                    reached.append("inside")
                os.kill(os.getpid(), signal.SIGTERM)
                reached.append("its end")
            reached.append("behind")

    with pytest.raises(StoppedError, match="nothing is lost"):
        work()
    assert reached == ["inside", "its end"]

    def more_work() -> None:
        with raise_stops("again"):
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("not held any more")

    with pytest.raises(StoppedError, match="again"):
        more_work()
    assert len(reached) == 2


def test_an_error_of_the_work_stays_what_it_is() -> None:
    with pytest.raises(LlmtuneError, match="other"), raise_stops("stopped"):
        raise LlmtuneError("other")


def test_an_error_that_a_signal_brought_about_is_a_stop() -> None:
    """As when the signal has ended a worker before it was handled here."""

    def work() -> None:
        try:
            work_until(signal.SIGTERM)
        except KeyboardInterrupt:
            raise DataError("a process was ended from outside") from None

    with pytest.raises(StoppedError, match="nothing lost"), raise_stops("nothing lost"):
        work()


def test_what_a_stop_means_changes_with_the_work() -> None:
    def work() -> None:
        with raise_stops("nothing lost") as stop:
            stop.message = "the rest goes on"
            work_until(signal.SIGINT)

    with pytest.raises(StoppedError, match="the rest goes on"):
        work()


@pytest.mark.process
@pytest.mark.parametrize(
    ("number", "expected"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 75), ("SIGHUP", 75)]
)
def test_a_stop_before_there_are_ranks(number: str, expected: int) -> None:
    program = f"""
import os, signal, sys
from llmtune.cli import main, train
train._train = lambda *_: os.kill(os.getpid(), signal.{number})
sys.exit(main.main([]))
"""
    done = run([sys.executable, "-c", program], cwd=ROOT)
    assert done.code == expected
    assert "stopped before training began" in done.err


#: What a program does when the signal comes, and its end as a shell gives it.
STUBBORN = {
    "a library that swallows every exception": (
        """
        while True:
            try:
                time.sleep(0.1)
            except BaseException:
                pass
    """
    ),
    "a call into C that does not come back": (
        """
        mutex = ctypes.create_string_buffer(64)
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
    """
    ),
    "a call that is not to be interrupted and does not come back": (
        """
        from llmtune.process import hold_interruptions
        with hold_interruptions():
            while True:
                time.sleep(0.1)
    """
    ),
    "a clean-up that never ends": (
        """
        try:
            time.sleep(600)
        finally:
            threading.Event().wait()
    """
    ),
}


def start_program(work: str, folder: Path) -> subprocess.Popen[str]:
    """The program, whose verb does ``work``, with a child and an orphaned grandchild in sessions of
    their own.
    """
    program = f"""
import ctypes, os, subprocess, sys, threading, time
from pathlib import Path
from llmtune.cli import main
def work():
{textwrap.indent(textwrap.dedent(work), "    ")}
def verb(composed, options):
    sleeps = "echo $$ > {folder}/$0; exec sleep 600"
    subprocess.Popen(["sh", "-c", sleeps, "child"], start_new_session=True)
    subprocess.Popen(["sh", "-c", f"sh -c '{{sleeps}}' grandchild & wait"], start_new_session=True)
    while len(list(Path("{folder}").iterdir())) < 2:
        time.sleep(0.01)
    print("works", flush=True)
    work()
main.VERBS["verify"] = main.VERBS["verify"].__class__(run=verb, summary="", loads_libraries=False)
sys.argv = ["llmtune", "verify"]
main.run()
"""
    return subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.process
@pytest.mark.parametrize("number", first(1, [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]))
@pytest.mark.parametrize("work", STUBBORN.values(), ids=STUBBORN)
def test_a_program_that_does_not_end_by_itself_is_ended_with_all_it_started(
    work: str, number: signal.Signals, tmp_path: Path
) -> None:
    with start_program(work, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "works\n"
        time.sleep(0.2)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    left = [
        file.name
        for file in tmp_path.iterdir()
        if Path(f"/proc/{file.read_text().strip()}/statm").exists()
    ]
    assert not left


@pytest.mark.process
def test_the_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    with start_program(STUBBORN["a clean-up that never ends"], tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert time.monotonic() - started < END_SECONDS - 1
