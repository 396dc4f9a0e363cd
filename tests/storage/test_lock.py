"""Who holds a run folder, and what is left of one that was not used."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from llmtune.errors import CheckpointError
from llmtune.storage.lock import find_holder, hold_lock, removed_if_unused


def test_a_folder_is_held_by_one(tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".lock"
    with (
        hold_lock(lock),
        pytest.raises(CheckpointError, match="another run is using this folder"),
        hold_lock(lock),
    ):
        pass
    with hold_lock(lock):
        pass


def test_a_lock_that_its_holder_removed_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "run" / ".lock"
    real = fcntl.flock
    removed: list[bool] = []

    def remove_before_the_first(file: object, how: int) -> None:
        if not removed:
            lock.unlink()
            removed.append(True)
        real(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", remove_before_the_first)
    with hold_lock(lock):
        assert lock.is_file(), "whoever comes next must meet the file that is held"
        with pytest.raises(CheckpointError, match="another run"), hold_lock(lock):
            pass


@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_only_a_folder_that_was_made_in_vain_goes(
    was_there: bool, writes: bool, fails: bool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    if was_there:
        run.mkdir()

    def use() -> None:
        # The lock is released last, as it is by the command.
        with ExitStack() as held, removed_if_unused(run / ".lock"):
            held.enter_context(hold_lock(run / ".lock"))
            if writes:
                (run / "config.yaml").touch()
            if fails:
                raise ValueError("boom")

    if fails:
        with pytest.raises(ValueError, match="boom"):
            use()
    else:
        use()
    assert run.exists() == (was_there or writes or not fails)


@pytest.mark.process
def test_who_is_refused_leaves_the_folder_to_its_holder(tmp_path: Path) -> None:
    """Both were started before the folder was there, and the other has written nothing into it
    yet.
    """
    lock = tmp_path / "run" / ".lock"

    def start_second() -> None:
        with ExitStack() as held, removed_if_unused(lock):
            # Meanwhile the other has made the folder.
            program = (
                "import sys; from pathlib import Path; from llmtune.storage.lock import hold_lock\n"
                "with hold_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.readline()"
            )
            other = subprocess.Popen(
                [sys.executable, "-c", program, str(lock)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            others.append(other)
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            held.enter_context(hold_lock(lock))

    others: list[subprocess.Popen[str]] = []
    with pytest.raises(CheckpointError, match="another run is using this folder"):
        start_second()
    assert lock.is_file()
    others[0].communicate("\n")
    assert others[0].returncode == 0


def test_the_holder_is_found_without_taking_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "run" / ".lock"
    assert find_holder(lock) is None
    with hold_lock(lock):
        assert find_holder(lock) == os.getpid()
    assert find_holder(lock) is None, "a lock that was left behind"
    with hold_lock(lock):
        pass


#: Linux gives no process a larger id.
MOST_PIDS = 1 << 22


def test_a_run_that_begins_now_is_not_disturbed(tmp_path: Path) -> None:
    # The lock is not tried before its holder has written its id: the last one's is dead.
    lock = tmp_path / ".lock"
    lock.write_text(str(MOST_PIDS + 1))
    with lock.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert find_holder(lock) is None


@pytest.mark.parametrize("text", ["", "x", "-1", "99999999999999999999"])
def test_a_file_that_is_no_lock_has_no_holder(text: str, tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_text(text)
    assert find_holder(lock) is None
    link = tmp_path / "link"
    link.symlink_to(lock)
    assert find_holder(link) is None
