"""What counts as a launcher, what is said about it, and that nobody waits for ranks which nobody
starts.
"""

from __future__ import annotations

import re
import socket
import threading
import time

import pytest

from llmtune.errors import MissingPrerequisiteError
from llmtune.launch.launchers import launcher as launchers
from llmtune.launch.launchers.launcher import Launcher, adopt_launcher
from llmtune.launch.launchers.meeting import await_ranks
from tests.support import free_port

PLACE = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
ALL = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **PLACE}
POD = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto"}
STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}

#: Environment -> the launcher (None: llmtune starts the ranks itself), whether the wait is bounded,
#: what is said.
FOUND = {
    "an empty one": ({}, None, False, ""),
    "torchrun, rank 1": ({**ALL, "TORCHELASTIC_RUN_ID": "none"}, "torchrun", False, ""),
    "torchrun, rank 0": (
        {**ALL, "RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"},
        "torchrun",
        False,
        "torchrun: rank 0 of 4, waiting for 3 others at 10.0.0.1:29500",
    ),
    "torchrun with one rank": (
        {**ALL, "RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"},
        "torchrun",
        False,
        "torchrun: rank 0 of 1",
    ),
    "DeepSpeed's launcher": (
        {**ALL, "CROSS_RANK": "0", "LOCAL_SIZE": "4"},
        "DeepSpeed's launcher",
        False,
        "",
    ),
    "srun": (STEP, "Slurm", False, r"Slurm: rank 0 of 4, waiting for 3 others at gpu1:\d+$"),
    "a shell of srun --pty": (
        {**STEP, "SLURM_PTY_PORT": "40123"},
        "Slurm",
        True,
        r"Slurm: rank 0 of 4, waiting for 3 others at gpu1:\d+ for 60 s$",
    ),
    "a batch script of Slurm": (
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        None,
        False,
        "",
    ),
    "a pod of a PyTorchJob": (
        {"RANK": "1", "WORLD_SIZE": "2", **PLACE, **POD},
        "Kubernetes, one rank a pod",
        False,
        "Kubernetes, one rank a pod: rank 1 of 2, waiting for 1 other at 10.0.0.1:29500",
    ),
    "the only pod of a PyTorchJob": (
        {"RANK": "0", "WORLD_SIZE": "1", **PLACE, **POD, "PET_NNODES": "1"},
        None,
        False,
        "RANK=0 WORLD_SIZE=1 .*: one rank, which needs no launcher: starting the ranks here",
    ),
    "all variables, left in a shell": (
        {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29777",
        },
        "variables of a launcher in the environment",
        True,
        "variables .*: rank 0 of 2, waiting for 1 other at 127.0.0.1:29777 for 60 s",
    ),
    "one rank a machine, by hand": (
        {"RANK": "1", "WORLD_SIZE": "2", **PLACE},
        "variables of a launcher in the environment",
        True,
        "rank 1 of 2, waiting for 1 other at 10.0.0.1:29500 for 60 s",
    ),
    "one rank, left in a shell": (
        {**ALL, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        None,
        False,
        "one rank, which needs no launcher",
    ),
    "only RANK": (
        {"RANK": "0"},
        None,
        False,
        "RANK=0 is set, and the other variables .* are not: starting the ranks here",
    ),
    "only WORLD_SIZE": (
        {"WORLD_SIZE": "8", **PLACE},
        None,
        False,
        "WORLD_SIZE=8 is set, and the other",
    ),
    "only a place to meet": (PLACE, None, False, ""),
    "one process of MPI": ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"}, None, False, ""),
}

REFUSED = {
    "nowhere to meet": (
        {"RANK": "0", "WORLD_SIZE": "2"},
        "but not MASTER_ADDR and MASTER_PORT: where do the 2 ranks meet",
    ),
    "no port": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"},
        "but not MASTER_PORT: .*unset RANK WORLD_SIZE",
    ),
    "a rank too many": (
        {**ALL, "RANK": "4"},
        "RANK=4 is not one of WORLD_SIZE=4 ranks; .*unset RANK",
    ),
    "no number": ({**ALL, "WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number; .*unset RANK"),
    "a port that is none": (
        {**ALL, "MASTER_PORT": "tcp://1"},
        "MASTER_PORT='tcp://1' is not a number",
    ),
    "a port too high": (
        {**ALL, "MASTER_PORT": "65536"},
        "MASTER_PORT=65536 is no port; .*unset RANK",
    ),
    "a port of nothing": ({**ALL, "MASTER_PORT": "0"}, "MASTER_PORT=0 is no port"),
    "several ranks a pod": (
        {"RANK": "0", "WORLD_SIZE": "16", **PLACE, **POD, "PET_NPROC_PER_NODE": "8"},
        "8 ranks on this machine: take torchrun -m llmtune",
    ),
    "an elastic PyTorchJob": (
        {**POD, "PET_NNODES": "1:2"},
        "PET_NNODES=1:2 is set for torchrun.*torchrun -m llmtune",
    ),
    "mpirun": (
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
        "MPI started 4 processes.*torchrun",
    ),
    "mpiexec of MPICH": ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "PMI_SIZE=2: MPI started 2 processes"),
}


@pytest.mark.parametrize(("environ", "name", "bounded", "said"), FOUND.values(), ids=FOUND)
def test_what_is_found_is_said(
    environ: dict[str, str], name: str | None, bounded: bool, said: str
) -> None:
    environ = dict(environ)
    lines: list[str] = []
    found = adopt_launcher(environ, lines.append)
    assert (found.name if found else None) == name
    assert len(lines) == (1 if said else 0), lines
    if said:
        assert re.search(said, lines[0]), lines
    if found is None:
        return
    assert found.meet_seconds == (60 if bounded else None)
    # What a rank reads, whoever started it.
    assert {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= environ.keys()


@pytest.mark.parametrize("more", [{}, POD], ids=["by hand", "in a pod"])
def test_the_only_rank_of_a_machine_is_its_first(more: dict[str, str]) -> None:
    environ = {"RANK": "3", "WORLD_SIZE": "4", **PLACE, **more}
    adopt_launcher(environ, lambda _: None)
    assert (environ["LOCAL_RANK"], environ["LOCAL_WORLD_SIZE"]) == ("0", "1")


@pytest.mark.parametrize(("environ", "said"), REFUSED.values(), ids=REFUSED)
def test_what_would_train_alone_or_wait_for_ever_is_refused(
    environ: dict[str, str], said: str
) -> None:
    with pytest.raises(MissingPrerequisiteError) as refusal:
        adopt_launcher(dict(environ), lambda _: None)
    assert re.search(said, str(refusal.value))
    assert refusal.value.exit_code == 7


def by_hand(rank: int, port: int, world_size: int = 2) -> Launcher:
    environ = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = adopt_launcher(environ, lambda _: None)
    assert found is not None
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_nobody_joins_gives_up_with_advice(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "UNATTENDED_SECONDS", 1.0)
    alone = by_hand(rank, free_port())
    started = time.monotonic()
    with pytest.raises(MissingPrerequisiteError) as given_up:
        await_ranks(alone)
    assert time.monotonic() - started < 10
    said = str(given_up.value)
    assert (
        "1 of 2 ranks came to 127.0.0.1:"
        if rank == 0
        else "rank 1 cannot meet the others at 127.0.0.1:"
    ) in said
    assert f"The environment says RANK={rank} WORLD_SIZE=2" in said
    assert "unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT" in said
    assert given_up.value.exit_code == 7


def test_a_shell_of_srun_is_told_how_to_start_ranks_in_it() -> None:
    found = adopt_launcher({**STEP, "SLURM_PTY_PORT": "40123"}, lambda _: None)
    assert found is not None
    assert "task 0 of srun --pty" in found.unattended
    without = {name: value for name, value in STEP.items() if name != "SLURM_PROCID"}
    assert adopt_launcher({**without, "SLURM_PTY_PORT": "40123"}, lambda _: None) is None, (
        "as it is told"
    )


def test_a_port_that_is_taken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "UNATTENDED_SECONDS", 1.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(
            MissingPrerequisiteError, match="rank 0 cannot meet the others at .*unset RANK"
        ):
            await_ranks(by_hand(0, other.getsockname()[1]))


def test_ranks_that_come_late_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "UNATTENDED_SECONDS", 20.0)
    port, stores = free_port(), []
    ranks = [
        threading.Thread(
            target=lambda rank=rank: stores.append(await_ranks(by_hand(rank, port, 3)))
        )
        for rank in range(3)
    ]
    for rank in reversed(ranks):
        rank.start()
        time.sleep(0.3)
    for rank in ranks:
        rank.join(20)
    assert [store is not None for store in stores] == [True] * 3


def test_a_launchers_own_ranks_keep_its_time_out() -> None:
    environ = {**ALL, "TORCHELASTIC_RUN_ID": "none"}
    found = adopt_launcher(environ, lambda _: None)
    assert found is not None
    assert await_ranks(found) is None
