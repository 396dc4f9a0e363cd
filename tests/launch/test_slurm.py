"""A task of a Slurm step knows its rank; a batch script and a shell of salloc are no ranks."""

from __future__ import annotations

import pytest

from llmtune.errors import MissingPrerequisiteError
from llmtune.launch.launchers.slurm import adopt_slurm, derive_rank, expand_counts, expand_hosts

#: Task 5 of ``srun --ntasks=11`` on three nodes of 4, 4 and 3.
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "11",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_TASKS_PER_NODE": "4(x2),3",
    "SLURM_STEP_NODELIST": "gpu[08-10]",
    "SLURM_JOB_NODELIST": "gpu[08-12]",
}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[01-03,07],gpu5", ["node01", "node02", "node03", "node07", "gpu5"]),
        ("a-1.cluster,b_2", ["a-1.cluster", "b_2"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[009-010]x", ["n009x", "n010x"]),
        ("rack[1-2]n[3,5]", ["rack1n3", "rack1n5", "rack2n3", "rack2n5"]),
        ("10.0.0.[1-2]", ["10.0.0.1", "10.0.0.2"]),
    ],
)
def test_a_list_of_hosts_is_expanded(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize(
    "text", ["", "n[1-", "n1]", "n[]", "n[a-b]", "n[3-1]", "n[[1]]", "a,,b", "a b", "n[1-2-3]"]
)
def test_what_is_no_list_of_hosts_is_refused(text: str) -> None:
    # It holds the part that is wrong, whichever that is.
    with pytest.raises(ValueError):  # noqa: PT011
        expand_hosts(text)


def test_counts_are_expanded() -> None:
    assert expand_counts("4(x2),3") == [4, 4, 3]
    assert expand_counts("8") == [8]
    for text in ("", "x2", "4(x)", "4(2)", "4,"):
        # It holds the part that is wrong, whichever that is.
        with pytest.raises(ValueError):  # noqa: PT011
            expand_counts(text)


def test_a_task_of_a_step_is_a_rank() -> None:
    assert derive_rank(STEP) == {
        "RANK": "5",
        "WORLD_SIZE": "11",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "CROSS_RANK": "1",
        "CROSS_SIZE": "3",
        "MASTER_ADDR": "gpu08",
        "MASTER_PORT": str(15000 + 4711 * 31 % 16384),
    }
    last = {**STEP, "SLURM_PROCID": "10", "SLURM_LOCALID": "2", "SLURM_NODEID": "2"}
    assert derive_rank(last)["LOCAL_WORLD_SIZE"] == "3"


def test_the_node_is_told_by_the_rank_and_the_count_by_the_job_where_slurm_says_no_more() -> None:
    bare = {
        name: value
        for name, value in STEP.items()
        if name not in ("SLURM_NODEID", "SLURM_TASKS_PER_NODE")
    }
    bare |= {"SLURM_NTASKS_PER_NODE": "4", "SLURM_STEP_NUM_TASKS": "12"}
    assert (derive_rank(bare)["CROSS_RANK"], derive_rank(bare)["LOCAL_WORLD_SIZE"]) == ("1", "4")


def test_every_rank_of_a_step_finds_the_same_door_and_other_steps_another() -> None:
    doors = {
        (derive_rank({**STEP, "SLURM_STEP_ID": step})["MASTER_PORT"]) for step in ("0", "1", "2")
    }
    assert len(doors) == 3
    assert all(15000 <= int(port) < 32768 for port in doors)
    assert derive_rank({**STEP, "SLURM_JOB_ID": "4712"})["MASTER_PORT"] not in doors


def test_a_task_that_sees_its_own_gpu_only_takes_that() -> None:
    assert derive_rank({**STEP, "CUDA_VISIBLE_DEVICES": "3"})["LOCAL_RANK"] == "0"
    assert derive_rank({**STEP, "CUDA_VISIBLE_DEVICES": "0,1,2,3"})["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},
        # A batch script of `sbatch --ntasks=8`, which is in no step.
        {
            "SLURM_JOB_ID": "1",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_NTASKS": "8",
            "SLURM_TASKS_PER_NODE": "8",
        },
        # srun -n 1; the shell that salloc starts as a step of its own.
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"},
    ],
)
def test_what_is_no_step_of_several_tasks_keeps_its_own_supervisor(environ: dict[str, str]) -> None:
    before = dict(environ)
    adopt_slurm(environ)
    assert environ == before


def test_a_launcher_inside_of_a_step_is_the_launcher() -> None:
    environ = {**STEP, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    before = dict(environ)
    adopt_slurm(environ)
    assert environ == before


def test_the_users_address_and_port_win() -> None:
    environ = {**STEP, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "23456", "RANK": "99"}
    adopt_slurm(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"], environ["RANK"]) == (
        "10.0.0.7",
        "23456",
        "5",
    )


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("SLURM_STEP_NODELIST", "gpu[08-", "SLURM_STEP_NODELIST='gpu[08-' is no list of hosts"),
        ("SLURM_TASKS_PER_NODE", "4x2", "SLURM_TASKS_PER_NODE='4x2' is no list of task counts"),
        ("SLURM_TASKS_PER_NODE", "4,4", "11 tasks, as [4, 4] on 3 nodes"),
        ("SLURM_PROCID", "first", "SLURM_PROCID='first' is not a number"),
        ("SLURM_PROCID", "11", "task 11 of 11"),
        ("SLURM_LOCALID", "", "SLURM_LOCALID is not set"),
        ("SLURM_LOCALID", "4", "task 5 of 11, 4 of [4, 4, 3] on node 1"),
        ("SLURM_JOB_ID", "", "SLURM_JOB_ID or SLURM_JOBID is not set"),
        ("SLURM_GPUS_PER_TASK", "4", "SLURM_GPUS_PER_TASK=4: a rank has one"),
        ("SLURM_GPUS_PER_TASK", "a100:2", "SLURM_GPUS_PER_TASK=a100:2: a rank has one"),
    ],
)
def test_variables_that_cannot_be_are_named(name: str, value: str, said: str) -> None:
    with pytest.raises(MissingPrerequisiteError) as caught:
        derive_rank({**STEP, name: value})
    assert said in str(caught.value)
