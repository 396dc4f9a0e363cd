"""The preflight of NVMe: real direct I/O, space, and nothing left behind."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from llmtune.errors import DoesNotFitError, MissingPrerequisiteError
from llmtune.launch.preflight.nvme import (
    disk_behind,
    hold_swap_folder,
    probe_disk,
    probe_nvme,
    swap_folder,
)


def test_the_probe_measures_and_cleans_up(tmp_path: Path) -> None:
    probe = probe_disk(tmp_path)
    assert probe.read > 10**6
    assert probe.write > 10**6
    assert not list(tmp_path.iterdir())


def test_the_disk_behind_a_folder_is_named() -> None:
    assert disk_behind(Path("/proc")) == "no local block device"
    assert disk_behind(Path(__file__).parent)


def test_a_file_system_without_direct_io_is_refused() -> None:
    with pytest.raises(MissingPrerequisiteError, match="no direct I/O"):
        probe_disk(Path("/proc"))


@pytest.mark.process
def test_too_little_space_is_said_before_anything_starts(tmp_path: Path) -> None:
    said: list[str] = []
    probe_nvme(str(tmp_path / "swap"), 10**6, 10**6, tmp_path, said.append)
    assert "reads" in said[0]
    with pytest.raises(DoesNotFitError, match=r"swap files and checkpoints need 1000.00 TB"):
        probe_nvme(str(tmp_path / "swap"), 10**15, 0, tmp_path, said.append)


def test_a_build_of_the_op_is_told_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "empty"))

    def compile_nothing(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        assert said == ["building DeepSpeed's AsyncIO (once per environment, about a minute) ..."]
        return subprocess.CompletedProcess([], 1, "", "no compiler")

    monkeypatch.setattr(subprocess, "run", compile_nothing)
    with pytest.raises(MissingPrerequisiteError, match="no compiler"):
        probe_nvme(str(tmp_path / "swap"), 1, 1, tmp_path, said.append)


def test_the_swap_folder_is_the_runs_own_and_goes_with_it(tmp_path: Path) -> None:
    folder = swap_folder(str(tmp_path), tmp_path / "run-a")
    assert folder != swap_folder(str(tmp_path), tmp_path / "run-b")
    folder.mkdir()
    (folder / "stale.swp").touch()
    with pytest.raises(ValueError, match="boom"):
        fail_inside(folder)
    assert not folder.exists()


def fail_inside(folder: Path) -> None:
    with hold_swap_folder(folder):
        assert not list(folder.iterdir())
        (folder / "x.swp").touch()
        raise ValueError("boom")


def test_a_path_that_cannot_be_used_is_named() -> None:
    with pytest.raises(MissingPrerequisiteError, match=r"offload.nvme_path=/proc/nothing"):
        probe_nvme("/proc/nothing", 1, 1, Path("/tmp"), print)
