"""A prediction that was killed goes on, and its bytes are those of one that nobody disturbed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmtune.cli.main import main
from llmtune.predict.folder import JobFolder
from tests.predict.models import make_bert, read_rows, sentence, write_rows
from tests.support import ROOT

ROWS = 1300


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A classifier, and rows for three windows."""
    folder = tmp_path_factory.mktemp("resume")
    model = make_bert(folder / "model", "Sequence", ["no", "yes", "perhaps"])
    texts = [{"text": sentence(number, 1 + number % 20), "id": number} for number in range(ROWS)]
    return model, write_rows(folder / "in.jsonl", texts)


def command(setting: tuple[Path, Path], out: Path, *more: str) -> list[str]:
    model, rows = setting
    return [
        *("predict", f"base={model}", f"predict.input={rows}", f"predict.output={out}"),
        *("precision=fp32", "data.max_seq_length=48", *more),
    ]


class Killed(BaseException):
    """Nothing of the program catches it."""


@pytest.fixture(scope="module")
def undisturbed(setting: tuple[Path, Path]) -> bytes:
    out = setting[0].parent / "undisturbed.jsonl"
    assert main(command(setting, out)) == 0
    return out.read_bytes()


def test_killed_before_or_behind_every_file_it_goes_on(
    setting: tuple[Path, Path],
    undisturbed: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The job's name, seven files of prepared rows, three of results, and the output."""
    out = tmp_path / "out.jsonl"
    real = Path.replace
    moves = {"left": 0}

    def replace(path: Path, target: Any) -> Any:
        if str(target).startswith(str(out)):
            if moves["left"] == 0:
                raise Killed
            moves["left"] -= 1
            if moves["left"] == 0:
                real(path, target)
                raise Killed
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    for allowed in (0, 1, *range(1, 8), 1, 1, 1, 1):
        moves["left"] = allowed
        with pytest.raises(Killed):
            main(command(setting, out))
    assert out.exists()
    moves["left"] = -1
    assert main(command(setting, out)) == 0
    assert out.read_bytes() == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_rows_that_were_predicted_are_not_predicted_again(
    setting: tuple[Path, Path], undisturbed: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    real = JobFolder.write_results
    windows: list[int] = []

    def write(folder: JobFolder, window: int, results: Any) -> None:
        windows.append(window)
        real(folder, window, results)
        if len(windows) == 2:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobFolder, "write_results", write)
        with pytest.raises(Killed):
            main(command(setting, out))
        assert main(command(setting, out)) == 0
    assert windows == [0, 1, 2]
    assert out.read_bytes() == undisturbed


def test_a_full_disk_is_said_and_the_same_command_goes_on(
    setting: tuple[Path, Path],
    undisturbed: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.jsonl"
    real = JobFolder.write_results

    def write(folder: JobFolder, window: int, results: Any) -> None:
        if window == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder.path))
        real(folder, window, results)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobFolder, "write_results", write)
        assert main(command(setting, out)) == 7
    error = capsys.readouterr().err
    assert f"No space left on device ({out}.parts): free space" in error
    assert not out.exists()
    assert main(command(setting, out)) == 0
    assert out.read_bytes() == undisturbed
    assert "512 of them by an earlier command" in capsys.readouterr().out


@pytest.mark.process
def test_two_processes_write_the_same_bytes(
    setting: tuple[Path, Path], undisturbed: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    assert main(command(setting, out, "launch.nproc=2")) == 0
    assert out.read_bytes() == undisturbed
    assert [row["id"] for row in read_rows(out)] == list(range(ROWS))


def find_workers(pid: int) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "llmtune.predict.worker" in child.cmdline():
                    found.append(child)
    return found


@pytest.mark.process
@pytest.mark.usefixtures("started_cold")
def test_killed_with_its_processes_it_leaves_none_and_goes_on(
    setting: tuple[Path, Path], undisturbed: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    arguments = command(setting, out, "predict.batch_size=1")
    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
        running = subprocess.Popen(
            [sys.executable, "-m", "llmtune", *arguments, "launch.nproc=2"],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        parts = JobFolder(tmp_path / "out.jsonl.parts")
        deadline = time.monotonic() + 120
        # Until both processes are there.
        children: list[psutil.Process] = []
        while len(children) < 2 and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
            if parts.prepared:
                children = find_workers(running.pid)
        os.kill(running.pid, number)
        assert running.wait(20) == code
        psutil.wait_procs(children, timeout=10)
        assert [one for one in children if one.is_running()] == []
        assert not out.exists()
    assert main(arguments) == 0
    assert [row["prediction"] for row in read_rows(out)] == [
        row["prediction"] for row in map(json.loads, undisturbed.splitlines())
    ]


@pytest.mark.process
def test_the_error_of_a_process_is_that_of_the_command(
    setting: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        # Prepared here, so that only the processes load the weights, which are cut off.
        patch.setattr("llmtune.predict.job._predict", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            main(command(setting, out, "launch.nproc=2"))
    (tmp_path / "out.jsonl.parts" / "tokens-000001.npz").write_bytes(b"")
    assert main(command(setting, out, "launch.nproc=2")) == 1
    assert "process 1: " in capsys.readouterr().err
