"""A hostfile is checked before DeepSpeed's runner gets it; what the runner is given arrives
unchanged behind two shells.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.launch.launchers import environment
from llmtune.launch.launchers.hostfile import quote_for_pdsh, read_hostfile, runner_command
from tests.support import run_cli


def test_hosts_and_slots_are_read_as_deepspeed_reads_them(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    file = tmp_path / "hosts"
    file.write_text("# ours\n\nnode-a slots=8\n  node-b   slots=4  # half\n10.0.0.3 slots=1\n")
    assert (
        read_hostfile(file)
        == {"node-a": 8, "node-b": 4, "10.0.0.3": 1}
        == dict(fetch_hostfile(str(file)))
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node-a slots=8\nnode-b\n", "hosts:2: 'node-b' is not 'HOST slots=N'"),
        ("node-a slots=0\n", "hosts:1: 'node-a slots=0' is not"),
        ("node-a slots = 8\n", "hosts:1:"),
        ("node-a slots=8\n\nnode-a slots=4\n", "hosts:3: node-a is there twice"),
        ("# nothing\n", "no line 'HOST slots=N'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_hostfile(file)
    assert said in str(caught.value)


@pytest.mark.process
def test_the_command_line_says_what_is_wrong_before_anything_starts(tmp_path: Path) -> None:
    done = run_cli("model=tiny", f"launch.hostfile={tmp_path}/hosts")
    assert (done.code, done.err.strip()) == (
        2,
        f"error: launch.hostfile={tmp_path}/hosts: No such file or directory",
    )


def test_without_pdsh_two_machines_are_refused_and_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    file = tmp_path / "hosts"
    file.write_text("a slots=1\nb slots=1\n")
    with pytest.raises(MissingPrerequisiteError, match="apt-get install pdsh"):
        runner_command(file, ["train"])
    file.write_text("a slots=2\n")
    command = runner_command(file, ["train", "run_name=it's"])
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert command[-2:] == ["train", "run_name=it's"], "no shell comes between"


@pytest.mark.process
@pytest.mark.parametrize(
    "argument",
    [
        "zero=2",
        "data.train=[{path:a.jsonl,weight:3},{path:b.jsonl}]",
        "data.train='[{path: a.jsonl, weight: 3}]'",
        "chat.prompt='costs $HOME `id` \"now\" 100%n \\d'",
        "run_name=a;b&c",
        "run_name=100%",
    ],
)
def test_an_argument_arrives_unchanged_behind_the_runner_and_a_shell(argument: str) -> None:
    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = SimpleNamespace(args=SimpleNamespace(user_args=[quote_for_pdsh(argument)]))
    (sent,) = PDSHRunner.parse_user_args(runner)
    line = f"printf %s {sent}".replace("%%", "%")
    assert (
        subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
        == argument
    )
    assert shlex.split(sent.replace("%%", "%")) or sent


def test_nodes_are_counted_as_each_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CROSS_SIZE", "GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "11")
    assert environment.launched_nodes() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert environment.launched_nodes() == 3
    monkeypatch.setenv("GROUP_WORLD_SIZE", "4")
    assert environment.launched_nodes() == 4
    monkeypatch.setenv("CROSS_SIZE", "5")
    assert environment.launched_nodes() == 5


def test_the_interface_is_left_to_gloo_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("CROSS_SIZE", raising=False)
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    environment.set_network_default()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
