"""A working folder that came from somebody else is data: its modules are not imported, its ``.env``
sets keys and no more.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from llmtune.cli.dotenv_file import load_dotenv_file
from llmtune.cli.main import main
from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.launch.launchers.hostfile import exec_runner, runner_environment
from llmtune.security.working_folder import leave_working_folder
from llmtune.track.services.wandb import check_working_folder
from tests.support import ROOT, TINY, run_cli

#: What the program, its ranks or their libraries import, of packages and of the standard library.
PLANTED = [
    "psutil",
    "dotenv",
    "hydra",
    "yaml",
    "torch",
    "deepspeed",
    "ctypes",
    "signal",
    "json",
    "hydra_plugins",
    "numpy",
    "xxhash",
]


@pytest.mark.process
@pytest.mark.usefixtures("started_cold")
def test_modules_of_the_working_folder_are_not_imported(tmp_path: Path) -> None:
    """Not by the program, not by two ranks, and not by the processes that these start."""
    here = tmp_path / "downloaded"
    here.mkdir()
    for name in PLANTED:
        (here / f"{name}.py").write_text(
            f"open({str(tmp_path)!r} + '/ran-{name}', 'w')\nraise ImportError('planted')\n"
        )
    (here / "rows.jsonl").write_text('{"text": "a row of words"}\n' * 16)
    done = run_cli(
        *TINY,
        "data.train=rows.jsonl",
        "data.format=text",
        "data.num_workers=1",
        "data.val_set_size=0",
        "export=none",
        *("train.max_steps=1", "launch.nproc=2", f"output_dir={tmp_path / 'run'}"),
        cwd=here,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert not sorted(file.name for file in tmp_path.glob("ran-*"))
    assert done.code == 0, done.err


def test_what_the_user_names_stays_on_the_module_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "path", [str(tmp_path), "/named/by/PYTHONPATH", str(tmp_path), "/usr/lib"]
    )
    leave_working_folder()
    assert sys.path == ["/named/by/PYTHONPATH", str(tmp_path), "/usr/lib"]
    assert os.environ["PYTHONSAFEPATH"] == "1"
    leave_working_folder()
    assert sys.path == ["/named/by/PYTHONPATH", str(tmp_path), "/usr/lib"]


def test_who_works_in_the_source_of_llmtune_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT), "/usr/lib"])
    leave_working_folder()
    assert sys.path == [str(ROOT), "/usr/lib"]
    assert "PYTHONSAFEPATH" not in os.environ


def test_a_working_folder_that_is_gone_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setattr(sys, "path", ["", "/usr/lib"])
    leave_working_folder()
    assert sys.path == ["/usr/lib"]


KEYS = [
    "HF_TOKEN",
    "WANDB_API_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "DB_PASSWORD",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_CLIENT_ID",
    "AZURE_CLIENT_SECRET",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "OPENAI_KEY",
    "GITHUB_PAT",
    "FTP_USER",
    "KAGGLE_USERNAME",
    "DB_PASS",
    "MY_APIKEY",
    "TOKEN",
]
NO_KEYS = [
    "LD_PRELOAD",
    "LD_LIBRARY_PATH",
    "LD_AUDIT",
    "PYTHONPATH",
    "PYTHONSTARTUP",
    "PYTHONHOME",
    "PATH",
    "BASH_ENV",
    "ENV",
    "HF_ENDPOINT",
    "HF_HOME",
    "WANDB_BASE_URL",
    "AWS_ENDPOINT_URL",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "GIT_ASKPASS",
    "SSH_ASKPASS",
    "HTTPS_PROXY",
    "SSL_CERT_FILE",
    "SSLKEYLOGFILE",
    "CUDA_VISIBLE_DEVICES",
    "TORCH_EXTENSIONS_DIR",
    "LLMTUNE_CACHE",
    "TRITON_CACHE_DIR",
    "HF_TOKEN_PATH",
    "CC",
    "PWD",
    "LD_TOKEN",
    "PYTHON_KEY",
    "DS_ENV_FILE",
    "NCCL_NET_PLUGIN",
    "GOOGLE_EXTERNAL_ACCOUNT_ALLOW_EXECUTABLES",
]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment with none of these variables, and a working folder."""
    for name in (*KEYS, *NO_KEYS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_keys_are_taken_from_the_file_and_nothing_else(bare: Path) -> None:
    (bare / ".env").write_text("".join(f"{name}=planted-{name}\n" for name in (*KEYS, *NO_KEYS)))
    os.environ["HF_TOKEN"] = "the-environment-wins"
    left_out = load_dotenv_file()
    assert {name for name in KEYS if os.environ.get(name) == f"planted-{name}"} == set(KEYS) - {
        "HF_TOKEN"
    }
    assert os.environ["HF_TOKEN"] == "the-environment-wins"
    assert not [name for name in NO_KEYS if name in os.environ]
    assert left_out == sorted(NO_KEYS)


def test_what_is_left_out_is_said_once(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bare / ".env").write_text("HF_HOME=/data\nHF_TOKEN=planted-token\nEMPTY\n")
    os.environ["PATH"] = "/usr/bin:/bin"
    assert main(["--cfg", "job", "model=tiny"]) == 0
    assert capsys.readouterr().err == (
        "note: .env: only keys and tokens are taken from it, and not HF_HOME; set them in the environment\n"  # noqa: E501
    )
    os.environ["RANK"] = "1"
    assert main(["--cfg", "job", "model=tiny"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664])
def test_an_ordinary_file_is_taken(mode: int, bare: Path) -> None:
    """Also one behind a link, and under umask 002 with a group of one's own."""
    (bare / "kept").write_text("HF_TOKEN=planted-token\n")
    (bare / "kept").chmod(mode)
    (bare / ".env").symlink_to("kept")
    assert load_dotenv_file() == []
    assert os.environ["HF_TOKEN"] == "planted-token"


def test_a_file_that_everybody_may_write_is_refused(
    bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bare / ".env").write_text("HF_TOKEN=planted-token\n")
    (bare / ".env").chmod(0o666)
    assert main(["--cfg", "job", "model=tiny"]) == MissingPrerequisiteError.exit_code
    assert re.search(
        r"\.env may be written by everybody .* chmod -R go-w \.env, or run llmtune from another",
        capsys.readouterr().err,
    )
    assert "HF_TOKEN" not in os.environ


def test_another_users_file_is_refused_and_a_folder_without_one_is_not(
    bare: Path, another_user: int
) -> None:
    assert load_dotenv_file() == []
    (bare / ".env").mkdir()
    assert load_dotenv_file() == []
    (bare / ".env").rmdir()
    (bare / ".env").write_text("HF_TOKEN=planted-token\n")
    with pytest.raises(MissingPrerequisiteError, match=r"\.env: \.env belongs to"):
        load_dotenv_file()
    assert "HF_TOKEN" not in os.environ


def test_a_secret_on_the_command_line_is_said_without_the_secret(
    bare: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ["PATH"] = "/usr/bin:/bin"
    monkeypatch.setenv("WANDB_API_KEY", "planted-key-123")
    secret = [
        "checkpoint.mirror=ftp://me:planted-password@host/x",
        "run_name=r-planted-key-123",
        "seed=7",
    ]
    assert main(["--cfg", "job", "model=tiny", *secret]) == 0
    said = capsys.readouterr().err
    assert said.startswith("note: there is a secret in checkpoint.mirror, run_name, and every user")
    assert "planted" not in said
    assert main(["--cfg", "job", "model=tiny", "checkpoint.mirror=s3://bucket/x"]) == 0
    assert capsys.readouterr().err == ""


def test_a_secret_does_not_go_onto_the_command_lines_of_other_machines(bare: Path) -> None:
    (bare / "hosts").write_text("a slots=1\n")
    with pytest.raises(
        ConfigError, match=r"launch.hostfile: there is a secret in checkpoint.mirror.*oc.env:NAME"
    ) as caught:
        exec_runner(bare / "hosts", ["train", "checkpoint.mirror=ftp://me:planted-password@host/x"])
    assert "planted" not in str(caught.value)


def test_deepspeeds_runner_gets_no_variables_that_it_would_show(
    bare: Path, monkeypatch: pytest.MonkeyPatch, another_user: int
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "planted")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    environment = runner_environment()
    assert environment["NCCL_DEBUG"] == "INFO"
    assert not [name for name in environment if name.startswith("MLFLOW")]
    given: dict[str, str] = {}

    def become(_program: str, _arguments: list[str], env: dict[str, str]) -> None:
        given.update(env)
        raise SystemExit

    monkeypatch.setattr(os, "execvpe", become)
    (bare / "hosts").write_text("a slots=1\n")
    with pytest.raises(SystemExit):
        exec_runner(bare / "hosts", ["train"])
    assert given == environment
    (bare / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n")
    with pytest.raises(
        MissingPrerequisiteError, match=r"variables for all nodes: \.deepspeed_env belongs to"
    ):
        runner_environment()


@pytest.mark.parametrize(
    "line",
    [
        "base_url = https://theirs",
        "base_url: https://theirs",
        "insecure_disable_ssl=true",
        "  https_proxy = http://theirs",
    ],
)
@pytest.mark.parametrize("folder", ["wandb", ".wandb"])
def test_the_working_folder_does_not_say_where_a_trackers_key_goes(
    folder: str, line: str, bare: Path
) -> None:
    check_working_folder()
    (bare / folder).mkdir()
    file = bare / folder / "settings"
    file.write_text(
        "[default]\nproject = mine\nentity = me\nmode = offline\n# base_url = x\n; api = y\n"
    )
    check_working_folder()
    file.write_text(f"[default]\nproject = mine\n{line}\n")
    with pytest.raises(MissingPrerequisiteError, match=re.split("[ =:]", line.strip())[0]):
        check_working_folder()


def test_another_users_settings_of_a_tracker_are_refused(bare: Path, another_user: int) -> None:
    (bare / "wandb").mkdir()
    (bare / "wandb" / "settings").write_text("[default]\nproject = theirs\n")
    with pytest.raises(MissingPrerequisiteError, match="W&B's settings: wandb/settings belongs to"):
        check_working_folder()


@pytest.mark.parametrize(
    "name", ["LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PATH", "BASH_ENV", "NCCL_NET_PLUGIN"]
)
def test_the_working_folder_does_not_say_what_other_machines_execute(name: str, bare: Path) -> None:
    (bare / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\nMY_PATH=/x\n")
    runner_environment()
    (bare / ".deepspeed_env").write_text(f"NCCL_DEBUG=INFO\n{name}=/planted\n")
    with pytest.raises(
        MissingPrerequisiteError, match=f"sets {name}, which says what every node executes; move it"
    ):
        runner_environment()
    (bare / "home").write_text(f"{name}=/x\n")
    os.environ["DS_ENV_FILE"] = str(bare / "home")
    runner_environment()
