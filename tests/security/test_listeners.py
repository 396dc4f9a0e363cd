"""Ranks of one machine listen on nothing that another machine reaches, and nothing that they
exchange can run code.
"""

from __future__ import annotations

import math
import os
import socket
import stat
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch

from llmtune.engine import distributed
from llmtune.launch.launchers.environment import loopback_only, rank_environment
from llmtune.storage.rank_files import meeting_file
from tests.security.listeners import descendants, is_loopback, listening
from tests.support import ROOT, TINY


@pytest.mark.process
def test_a_run_of_two_ranks_listens_on_the_loopback_alone(tmp_path: Path) -> None:
    """Also where the machine is set up for runs on several."""
    command = [
        sys.executable,
        "-m",
        "llmtune",
        *TINY,
        "launch.nproc=2",
        "train.max_steps=1",
        "export=none",
        *("data.val_set_size=0", f"output_dir={tmp_path / 'run#1'}"),
    ]
    outside = next(
        (name for name, up in psutil.net_if_stats().items() if up.isup and name != "lo"), "eth0"
    )
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": outside, "NCCL_SOCKET_IFNAME": outside}
    (tmp_path / "a#b?").mkdir()
    environment["TMPDIR"] = str(tmp_path / "a#b?")
    run = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen: set[tuple[int, str, int]] = set()
    while run.poll() is None:
        seen |= listening(descendants(run.pid))
        time.sleep(0.02)
    assert run.returncode == 0, run.communicate()[0][-3000:]
    assert {is_loopback(address) for _, address, _ in seen} == {True}, seen
    assert len({pid for pid, _, _ in seen}) >= 2, (
        "both ranks were looked at while they talked to each other"
    )


def test_a_listening_socket_is_seen_and_told_from_one_of_the_loopback() -> None:
    for family, host, inside in (
        (socket.AF_INET, "127.0.0.1", True),
        (socket.AF_INET, "127.9.9.9", True),
        (socket.AF_INET, "0.0.0.0", False),
        (socket.AF_INET6, "::1", True),
        (socket.AF_INET6, "::", False),
        (socket.AF_INET6, "::ffff:127.0.0.1", True),
    ):
        with socket.socket(family) as server:
            server.bind((host, 0))
            assert server.getsockname()[1] not in {
                port for _, _, port in listening({os.getpid()})
            }, "only bound"
            server.listen()
            (found,) = {
                entry for entry in listening({os.getpid()}) if entry[2] == server.getsockname()[1]
            }
            assert found[0] == os.getpid()
            assert is_loopback(found[1]) is inside


def test_torchs_own_meeting_place_listens_on_everything() -> None:
    """What the file stands for."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, 1, True, timeout=timedelta(seconds=10))
    (address,) = {address for _, address, port in listening({os.getpid()}) if port == store.port}
    assert not is_loopback(address)


def test_ranks_are_told_to_stay_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0,ib1")
    environment = rank_environment(1, 2, 4000, tmp_path)
    name = environment["GLOO_SOCKET_IFNAME"]
    assert "127.0.0.1" in {address.address for address in psutil.net_if_addrs()[name]}
    assert environment["NCCL_SOCKET_IFNAME"] == f"={name}"
    monkeypatch.setattr(psutil, "net_if_addrs", dict)
    assert loopback_only() == {}, "without a loopback, what is set stays"
    assert rank_environment(1, 2, 4000, tmp_path)["GLOO_SOCKET_IFNAME"] == "ib0"


def test_the_meeting_place_is_closed_to_other_users() -> None:
    from llmtune.launch.supervise.rank_group import RankGroup

    group = RankGroup([], 0)
    try:
        folder = meeting_file(group.folder).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder.stat().st_uid == os.getuid()
    finally:
        group.close()


def test_what_ranks_tell_each_other_is_json() -> None:
    rank = distributed.Rank(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    value = {
        "text": "pä\u2028\x00\ud83d 👩‍💻",
        "many": [1, -2.5, None, True],
        "long": "x" * 100_000,
        "big": 2**70,
    }
    assert distributed.gather_objects(value, rank) == [value]
    assert distributed.broadcast_object(value, rank) == value
    assert distributed.gather_objects(("a", 1), rank) == [["a", 1]], (
        "the same on one rank and on several"
    )
    (back,) = distributed.gather_objects([math.inf, math.nan], rank)
    assert back[0] == math.inf
    assert math.isnan(back[1])
    for unfit in (Path("/"), {1, 2}, print):
        with pytest.raises(TypeError, match="not JSON serializable"):
            distributed.broadcast_object(unfit, rank)
