"""The health check of the image: a rank without progress, a page and a server that are silent."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from llmtune.config.groups.launch import LaunchConfig
from llmtune.launch.supervise import phase_records
from llmtune.storage.phase_record import PhaseRecord
from llmtune.storage.rank_files import phase_file
from tests.docker.files import load_program

health = load_program("health")
NOW = 1e9


def note(folder: Path, rank: int, phase: str, age: float) -> None:
    run = folder / "llmtune-abc"
    run.mkdir(exist_ok=True)
    file = phase_file(run, rank)
    descriptor = PhaseRecord.open(file)
    PhaseRecord(phase=phase, step=7).write(descriptor)
    os.close(descriptor)
    os.utime(file, (NOW - age, NOW - age))


def test_it_waits_as_long_as_the_supervisor_does() -> None:
    assert LaunchConfig().hang_timeout == health.LIMIT_SECONDS
    assert phase_records._WITHOUT_NOTES == health.PHASES_WITHOUT_NOTES
    assert phase_records._WITHOUT_NOTES_FACTOR == health.WITHOUT_NOTES_FACTOR


@pytest.mark.parametrize(
    ("phase", "age", "is_stuck"),
    [
        ("forward", 90.0, False),
        ("forward", 110.0, True),
        ("load", 110.0, False),
        ("load", 1100.0, True),
    ],
)
def test_a_rank_without_progress_is_found(
    tmp_path: Path, phase: str, age: float, is_stuck: bool
) -> None:
    note(tmp_path, 0, "backward", 1.0)
    note(tmp_path, 1, phase, age)
    problem = health.find_stuck_rank(tmp_path, 100.0, NOW)
    assert (problem is not None) == is_stuck
    if problem is not None:
        assert problem == f"phase-1: no progress for {age:.0f} s in '{phase}', step 7"


def test_where_no_rank_is_under_way_nothing_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert health.find_stuck_rank(tmp_path, 100.0, NOW) is None
    note(tmp_path, 0, "forward", 0.0)
    phase_file(tmp_path / "llmtune-abc", 0).write_text("half a rec")
    assert health.find_stuck_rank(tmp_path, 100.0, NOW + 1e6) is None


def test_the_limit_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(health.tempfile, "gettempdir", lambda: str(tmp_path))
    note(tmp_path, 0, "forward", 0.0)
    monkeypatch.setattr(health.time, "time", lambda: NOW + 60)
    assert health.main(["train"]) == 0
    monkeypatch.setenv("LLMTUNE_HEALTH_SECONDS", "50")
    assert health.main(["train"]) == 1
    assert "no progress for 60 s" in capsys.readouterr().out


def serve(answer: bytes) -> int:
    """A port that sends these bytes to the first who connects."""
    listener = socket.create_server(("127.0.0.1", 0))

    def greet() -> None:
        connection, _ = listener.accept()
        with listener, connection:
            connection.sendall(answer)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(4096)

    threading.Thread(target=greet, daemon=True).start()
    return int(listener.getsockname()[1])


def test_a_server_that_greets_is_well() -> None:
    assert health.main(["ssh", str(serve(b"SSH-2.0-OpenSSH_9.2\r\n"))]) == 0
    assert health.main(["ssh", str(serve(b"HTTP/1.0 400\r\n"))]) == 1
    ok = b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n"
    assert health.main(["http", f"http://127.0.0.1:{serve(ok)}/"]) == 0
    gone = b"HTTP/1.0 503 Gone\r\nContent-Length: 0\r\n\r\n"
    assert health.main(["http", f"http://127.0.0.1:{serve(gone)}/"]) == 1


def test_a_server_that_is_not_there_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert health.main(["ssh", str(port)]) == 1
    assert health.main(["http", f"http://127.0.0.1:{port}/"]) == 1
    assert health.main([]) == 1
