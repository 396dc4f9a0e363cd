"""``docker/check.sh`` on machines that lack something, played by programs on PATH."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.docker.files import DOCKER

pytestmark = pytest.mark.process

COMPLETE = {
    "docker": """case "$*" in
        "version"*) echo 28.2.2 ;; "compose version"*) echo 2.40.3 ;; "info"*) echo /nowhere ;;
    esac""",
    "nvidia-smi": "echo 570.86.10",
    "nvidia-ctk": "true",
}


def check(tmp_path: Path, programs: dict[str, str], **environment: str) -> tuple[int, str]:
    """Exit code and output of the script beside a copy of no ``.env``."""
    folder = tmp_path / "docker"
    folder.mkdir(exist_ok=True)
    script = folder / "check.sh"
    script.write_bytes((DOCKER / "check.sh").read_bytes())
    tools = tmp_path / "bin"
    tools.mkdir(exist_ok=True)
    for name, text in programs.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    # A docker of this machine is not to be seen.
    for name in ("awk", "bash", "df", "dirname", "head", "id", "sed", "sort", "stat", "tail"):
        (tools / name).symlink_to(f"/usr/bin/{name}") if not (tools / name).exists() else None
    done = subprocess.run(
        ["/bin/bash", str(script)],
        env={"PATH": str(tools), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_a_machine_that_has_all_is_well(tmp_path: Path) -> None:
    code, out = check(tmp_path, COMPLETE)
    assert code == 0, out
    assert "BAD" not in out
    assert "Docker engine 28.2.2" in out
    assert "there is no docker/.env" in out


def test_what_is_missing_is_named_with_what_helps(tmp_path: Path) -> None:
    code, out = check(tmp_path, {})
    assert code == 7
    assert out.count("BAD") == out.count("-> ") == 3
    assert "docker is not installed" in out
    assert "nvidia-container-toolkit" in out
    assert out.endswith("3 problems would stop a container\n")


def test_what_is_too_old_or_fails_is_named(tmp_path: Path) -> None:
    old = {
        **COMPLETE,
        "docker": """case "$*" in
            "version"*) echo 20.10.24 ;; "compose version"*) echo v2.26.1 ;; *) exit 1 ;;
        esac""",
        "nvidia-smi": "exit 9",
    }
    code, out = check(tmp_path, old)
    assert code == 7
    assert "the Docker engine is 20.10.24" in out
    assert "docker compose is 2.26.1, and 'gpus: all' needs 2.30" in out
    assert "nvidia-smi fails" in out


def test_folders_and_keys_are_looked_at(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("data", "runs", "cache")}
    for folder in folders.values():
        folder.mkdir()
    folders["runs"].chmod(0o755)
    folders["cache"].chmod(0o777)
    docker = tmp_path / "docker"
    docker.mkdir()
    env = docker / ".env"
    env.write_text(f'HF_TOKEN=secret\nRUNS_DIR="{folders["runs"]}"\nNVME_DIR={tmp_path}/none\n')
    env.chmod(0o644)
    folders["data"].chmod(0o700)
    code, out = check(
        tmp_path,
        COMPLETE,
        DATA_DIR=str(folders["data"]),
        USER_ID="4321",
        CACHE_DIR=str(folders["cache"]),
    )
    assert code == 7
    assert f"-> chmod o+rx {folders['data']}" in out
    assert f"-> sudo chown 4321:4321 {folders['runs']}" in out
    assert f"NVME_DIR: there is no folder {tmp_path}/none" in out
    assert "others may read it (mode 644)" in out
    assert "secret" not in out
    assert "BAD   CACHE_DIR" not in out or "GiB are free" in out
