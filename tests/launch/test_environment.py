"""What ranks find in their environment: a port that is held until they have ended, shared memory
whose name is soon gone, and their share of the cores.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest

from llmtune.launch.launchers.environment import (
    hold_port,
    remove_shared_buffers,
    set_thread_default,
)


def test_rank_0_listens_on_a_port_that_is_held_and_nobody_else_gets_it() -> None:
    from torch.distributed import TCPStore

    with hold_port() as held:
        port = int(held.getsockname()[1])
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        given = set()
        for _ in range(200):
            with socket.socket() as other:
                other.bind(("127.0.0.1", 0))
                given.add(other.getsockname()[1])
        assert port not in given
        for libuv in (True, False):
            store = TCPStore(
                "127.0.0.1", port, 1, True, timeout=timedelta(seconds=10), use_libuv=libuv
            )
            store.set("met", "yes")
            assert store.get("met") == b"yes"
            del store


def test_two_groups_that_start_at_once_meet_at_ports_of_their_own() -> None:
    held = [hold_port() for _ in range(50)]
    assert len({one.getsockname()[1] for one in held}) == 50
    for one in held:
        one.close()


def test_buffers_are_removed_by_address_and_port() -> None:
    own, user = f"test{os.getpid()}", os.getuid()
    names = [
        f"deepspeed_allreduce_buffer_{user}_{own}_{port}_{rank}"
        for port in (4001, 4002)
        for rank in (0, 1)
    ]
    files = [Path("/dev/shm") / name for name in names]
    try:
        for file in files:
            file.touch()
        remove_shared_buffers(4001, own)
        assert [file.exists() for file in files] == [False, False, True, True]
        remove_shared_buffers(4002, "*")
        assert [file.exists() for file in files] == [False, False, True, True], (
            "an address is no pattern"
        )
        remove_shared_buffers(4002, own)
        assert not any(file.exists() for file in files)
    finally:
        for file in files:
            file.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("machine", "mine", "ranks", "is_rank", "threads"),
    [
        # The supervisor shares what it has, also under taskset.
        (64, 64, 8, False, 8),
        (64, 16, 8, False, 2),
        (2, 2, 4, False, 1),
        # A rank of torchrun has the whole machine before it, and takes its share; one of Slurm has
        # cores of its own.
        (64, 64, 8, True, 8),
        (64, 8, 8, True, 8),
        (64, 4, 8, True, 4),
        (2, 2, 4, True, 1),
    ],
)
def test_cores_are_shared_once(
    machine: int,
    mine: int,
    ranks: int,
    is_rank: bool,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: machine)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(mine)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    if is_rank:
        monkeypatch.setenv("RANK", "0")
    set_thread_default(ranks)
    assert os.environ["OMP_NUM_THREADS"] == str(threads)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    set_thread_default(ranks)
    assert os.environ["OMP_NUM_THREADS"] == "3", "what the user set wins"
