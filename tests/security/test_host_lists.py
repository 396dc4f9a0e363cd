"""Hosts of a hostfile and of Slurm are given to ssh: only names and addresses are hosts, and there
is an end to them.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.launch.launchers.hostfile import read_hostfile
from llmtune.launch.launchers.launcher import adopt_launcher
from llmtune.launch.launchers.slurm import derive_rank, expand_counts, expand_hosts

OPTIONS = [
    "-oProxyCommand=touch${IFS}/tmp/x",
    "-lroot",
    "--help",
    "a;id",
    "$(id)",
    "`id`",
    "a|b",
    "a,b",
    "n[1-3]",
    "^file",
    "%h",
    "a/b",
]


@pytest.mark.parametrize(
    "host",
    [
        *OPTIONS,
        "user@-oProxyCommand=x",
        "@host",
        "a@b@c",
        ".",
        "_x",
        "ssh:host",
        "hôst",
        "a\x1b[2J",
    ],
)
def test_what_is_no_host_is_refused_by_its_line(host: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(f"good slots=1\n{host} slots=1\n")
    with pytest.raises(ConfigError, match="hosts:2: .* is no name or address of a machine"):
        read_hostfile(file)


def test_hosts_of_every_right_kind_are_taken(tmp_path: Path) -> None:
    hosts = [
        "node-a",
        "10.0.0.3",
        "gpu01.cluster.example.org",
        "ubuntu@10.0.0.4",
        "_svc@n1",
        "h",
        "3",
        "A_b",
        "node-a-",
    ]
    file = tmp_path / "hosts"
    file.write_text("".join(f"{host} slots=8  # with a comment\n" for host in hosts))
    assert list(read_hostfile(file)) == hosts
    assert expand_hosts(",".join(host for host in hosts if "@" not in host)) == [
        h for h in hosts if "@" not in h
    ]


@pytest.mark.parametrize("slots", ["99999", "²", "٣", "1e3", "-1", "9" * 5000])
def test_slots_that_are_no_small_number_are_refused(slots: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(f"node slots={slots}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="hosts:1: "):
        read_hostfile(file)


@pytest.mark.parametrize(
    "text",
    [
        *(host for host in OPTIONS if host not in ("a,b", "n[1-3]")),
        "-oProxyCommand=x[1-2]",
        "n[1-99999999999]",
        "n[1-70000]",
        "n[²-3]",
        "n[1-",
        "n]1[",
        "",
        "n[2-1]",
        "n[]",
        "a[1]" * 500,
        "a[0-9]" * 9,
        f"n[1-{'9' * 5000}]",
        ",".join(["n"] * 70000),
        "[" * 2000 + "]" * 2000,
    ],
)
def test_a_list_of_slurms_that_is_none_or_has_no_end_is_refused_at_once(text: str) -> None:
    began = time.monotonic()
    with pytest.raises(ValueError):  # noqa: PT011 - what is caught, and named with its variable
        expand_hosts(text)
    assert time.monotonic() - began < 5


def test_the_largest_machines_are_no_hostile_ones() -> None:
    assert len(expand_hosts("frontier[00001-09408]")) == 9408
    assert expand_hosts("rack[1-2]n[08-10],x")[:3] == ["rack1n08", "rack1n09", "rack1n10"]
    assert len(expand_counts("8(x9408)")) == 9408


@pytest.mark.parametrize("text", ["1(x99999999999)", "1(x70000)", "²", "9" * 5000, "1(x1),", "-1"])
def test_counts_of_tasks_without_end_are_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        expand_counts(text)


@pytest.mark.parametrize("number", ["²", "٣", "", "9" * 5000, "0x1", "1\n"])
def test_numbers_of_launchers_are_digits(number: str) -> None:
    place = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        with pytest.raises(MissingPrerequisiteError):
            adopt_launcher({**place, name: number}, lambda _: None)
    step = {
        "SLURM_PROCID": number or "²",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_LOCALID": "0",
    }
    with pytest.raises(MissingPrerequisiteError):
        derive_rank(step)
