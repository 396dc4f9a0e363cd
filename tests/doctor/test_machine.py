"""``doctor`` finds what would stop a run, fixes what is safe, and shows no secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtune.cli.main import main
from llmtune.doctor import software
from llmtune.doctor.ops import inspect_locks
from llmtune.launch.preflight import deepspeed_ops
from tests.support import run_cli


@pytest.fixture
def extensions(tmp_path: Path) -> Path:
    """An extensions folder with a lock that a killed build left."""
    folder = tmp_path / "extensions"
    (folder / "async_io").mkdir(parents=True)
    (folder / "async_io" / "lock").touch()
    return folder


@pytest.mark.process
def test_a_stale_lock_is_found_and_a_run_removes_it(
    extensions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    lock = extensions / "async_io" / "lock"
    main(["doctor", "--json"])
    findings = json.loads(capfd.readouterr().out)["findings"]
    assert any(
        str(lock) in finding["message"] and finding["command"] == f"rm {lock}"
        for finding in findings
    )

    with deepspeed_ops.hold_ops():
        assert not lock.exists()


def test_fix_removes_the_lock(extensions: Path) -> None:
    lock = extensions / "async_io" / "lock"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
        assert deepspeed_ops.stale_locks() == [lock]
        (finding,) = inspect_locks()
        assert finding.fix is not None
        assert finding.fix() is None
        assert not deepspeed_ops.stale_locks()
        (clean,) = inspect_locks()
    assert clean.state == "ok"


@pytest.mark.process
def test_a_healthy_machine_is_exit_0_and_tokens_are_not_shown() -> None:
    done = run_cli("doctor", env={"HF_TOKEN": "hf_planted", "WANDB_API_KEY": "planted"})
    assert done.code == 0, done.out + done.err
    assert "HF_TOKEN         present" in done.out
    assert "planted" not in done.out + done.err
    for what in (
        "packages",
        "compiler",
        "libaio",
        "op locks",
        "ops",
        "open files",
        "/dev/shm",
        "runs",
        "model hub cache",
    ):
        assert what in done.out


@pytest.mark.parametrize(
    ("package", "version"),
    [("deepspeed", "0.14.0"), ("deepspeed", "0.20.1"), ("peft", "0.17.1"), ("bitsandbytes", None)],
)
def test_a_version_that_is_known_to_break_is_an_unmet_requirement(
    package: str, version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = software.installed_version
    monkeypatch.setattr(
        software, "installed_version", lambda name: version if name == package else real(name)
    )
    (finding,) = software.inspect_packages()
    assert finding.state == "bad"
    assert f"{version or 'none'} is installed" in finding.message
    assert finding.command is not None
    assert package in finding.command
