"""Two network namespaces as two nodes that share the run folder: each launcher, a node that is
lost, a network that is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.harness import BASE, SAVE_STEPS, STEPS, Run, judge_folder, judge_losses
from tests.support import ROOT, losses

pytestmark = [pytest.mark.process, pytest.mark.slow]

TOOLS = Path(sys.executable).parent
HOSTS = ("node01", "node02")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = "29555"
#: Ranks come from the launchers.
OVERRIDES = [text for text in BASE if not text.startswith("launch.nproc")]

#: Command of a node, by its number.
Launcher = Callable[[int, Run], tuple[list[str], dict[str, str]]]


class Nodes:
    """Two namespaces with a cable between them."""

    def __init__(self, named: bool):
        """
        Args:
            named: Whether the nodes have names of their own that each resolves; on node01, as on
                Debian, to a loopback address.
        """
        mark = uuid.uuid4().hex[:6]
        self.names = (f"lt{mark}a", f"lt{mark}b")
        self.named = named
        self._processes: list[subprocess.Popen[bytes]] = []
        self._consoles: list[Path] = []

    def __enter__(self) -> Nodes:
        try:
            for name in self.names:
                ip("netns", "add", name)
                if self.named:
                    own = Path("/etc/netns") / name
                    own.mkdir(parents=True)
                    first = "127.0.1.1" if name == self.names[0] else ADDRESSES[0]
                    (own / "hosts").write_text(
                        f"127.0.0.1 localhost\n{first} {HOSTS[0]}\n{ADDRESSES[1]} {HOSTS[1]}\n"
                    )
            first, second = self.names
            ip(
                "link",
                "add",
                first,
                "netns",
                first,
                "type",
                "veth",
                "peer",
                "name",
                second,
                "netns",
                second,
            )
            for name, address in zip(self.names, ADDRESSES, strict=True):
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
                ip("-n", name, "link", "set", name, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in range(2):
            self.kill(node)
        for process in self._processes:
            process.wait(30)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)
        with contextlib.suppress(OSError):
            Path("/etc/netns").rmdir()

    def command(self, node: int, command: Sequence[str]) -> list[str]:
        """A command inside of a node."""
        inside = ["ip", "netns", "exec", self.names[node]]
        if self.named:
            inside += ["unshare", "--uts", "sh", "-c", f'hostname {HOSTS[node]} && exec "$@"', "sh"]
        return [*inside, *command]

    def start(self, run: Run, launcher: Launcher, *more: str, slow: float = 0.0) -> None:
        """The same on both nodes, as somebody does who logs in on each."""
        run.starts += 1
        self._processes, self._consoles = [], []
        for node in range(2):
            command, env = launcher(node, run)
            environment = {
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parent / "inside"),
                "FAULT_DIR": str(run.traces),
                "FAULT_SLOW": json.dumps({"step:*": slow}),
                "LLMTUNE_FAULT_ID": run.mark,
                # As on one machine, for the same digits.
                "OMP_NUM_THREADS": "1",
                **env,
            }
            console = run.traces / f"console-{run.starts}-{node}.txt"
            whole = self.command(node, [*command, *run.overrides, f"output_dir={run.path}", *more])
            with console.open("wb") as out:
                self._processes.append(
                    subprocess.Popen(whole, cwd=ROOT, env=environment, stdout=out, stderr=out)
                )
            self._consoles.append(console)
        run.process = self._processes[0]

    def console(self, node: int) -> str:
        """What a node printed since its last start."""
        return self._consoles[node].read_text(errors="replace")

    def end(self, node: int, timeout: float = 240) -> int:
        """Exit code of a node's command, when it has ended."""
        try:
            return self._processes[node].wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"node {node} did not end within {timeout:g}"
                f" s\n{self.console(0)}\n{self.console(1)}"
            ) from None

    def finish(self, run: Run, launcher: Launcher, *more: str) -> None:
        """To the good end of both."""
        self.start(run, launcher, *more)
        codes = [self.end(node) for node in range(2)]
        assert codes == [0, 0], f"{codes}\n{self.console(0)}\n{self.console(1)}"
        assert self.left() == []

    def pids(self, node: int) -> list[int]:
        """Every process on a node."""
        done = subprocess.run(
            ["ip", "netns", "pids", self.names[node]], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in done.stdout.split()]

    def kill(self, node: int) -> None:
        """``kill -9`` for every process on a node, at once."""
        for pid in self.pids(node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def left(self, seconds: float = 5.0) -> list[int]:
        """Processes that are still there a while later."""
        deadline = time.monotonic() + seconds
        while (pids := [*self.pids(0), *self.pids(1)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return pids

    def send(self, node: int, number: signal.Signals) -> None:
        """Signal a node's command, which is its rank where no launcher is."""
        self._processes[node].send_signal(number)

    def cable(self, state: str) -> None:
        """``up`` or ``down``."""
        ip("-n", self.names[0], "link", "set", self.names[0], state)


def ip(*arguments: str) -> None:
    """iproute2."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def reason_against() -> str | None:
    """Why this machine lets us make no namespace."""
    name = f"lt{uuid.uuid4().hex[:6]}"
    try:
        done = subprocess.run(
            ["ip", "netns", "add", name], capture_output=True, text=True, check=False
        )
    except OSError as error:
        return f"iproute2: {error}"
    if done.returncode == 0:
        subprocess.run(["ip", "netns", "del", name], check=False)
        return None
    return f"ip netns add: {done.stderr.strip()}"


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    reason = reason_against()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Two nodes that know each other by address only, on machines whose own name means the
    loopback.
    """
    with Nodes(named=False) as made:
        yield made


@pytest.fixture
def named_nodes() -> Iterator[Nodes]:
    """Two nodes with names."""
    with Nodes(named=True) as made:
        yield made


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """The run that both nodes share."""
    made = Run(tmp_path / "shared", ("zero=2",), OVERRIDES)
    yield made
    made.clean()


def torchrun(node: int, run: Run) -> tuple[list[str], dict[str, str]]:
    """c10d rendezvous by name."""
    where = ["--rdzv_backend=c10d", f"--rdzv_endpoint={HOSTS[0]}:{PORT}", f"--rdzv_id={run.mark}"]
    if node == 0:
        # Its own name is that of the loopback here, which the other node cannot reach.
        where.append(f"--local_addr={ADDRESSES[0]}")
    command = [str(TOOLS / "torchrun"), "--nnodes=2", "--nproc_per_node=1", *where]
    return [*command, "--module", "llmtune"], {"DS_ACCELERATOR": "cpu"}


def static_torchrun(node: int, run: Run) -> tuple[list[str], dict[str, str]]:
    """Ranks by number, at a known address."""
    where = [f"--node_rank={node}", f"--master_addr={ADDRESSES[0]}", f"--master_port={PORT}"]
    command = [str(TOOLS / "torchrun"), "--nnodes=2", "--nproc_per_node=1", *where]
    return [*command, "--module", "llmtune"], {"DS_ACCELERATOR": "cpu"}


def deepspeed(node: int, run: Run) -> tuple[list[str], dict[str, str]]:
    """DeepSpeed's runner on each node by itself."""
    hosts = run.traces / "hosts"
    hosts.write_text(f"# two nodes\n{HOSTS[0]} slots=1\n{HOSTS[1]} slots=1\n")
    where = ["--node_rank", str(node), "--master_addr", ADDRESSES[0], "--master_port", PORT]
    command = [str(TOOLS / "deepspeed"), "--hostfile", str(hosts), "--no_ssh", *where]
    return [*command, "scripts/train.py"], {"PATH": f"{TOOLS}:{os.environ['PATH']}"}


def deepspeed_module(node: int, run: Run) -> tuple[list[str], dict[str, str]]:
    """The same without a script."""
    command, env = deepspeed(node, run)
    return [*command[:-1], "--module", "llmtune"], env


def slurm(node: int, run: Run) -> tuple[list[str], dict[str, str]]:
    """What ``srun`` sets in the two tasks of a step."""
    variables = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(node),
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": str(node),
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "node[01-02]",
    }
    return [sys.executable, "-m", "llmtune"], variables


def slurm_by_address(node: int, run: Run) -> tuple[list[str], dict[str, str]]:
    """The same where the names of nodes resolve nowhere: the user's MASTER_ADDR wins."""
    command, variables = slurm(node, run)
    return command, {**variables, "MASTER_ADDR": ADDRESSES[0]}


def check_equal(run: Run, undisturbed: Undisturbed) -> None:
    """Every number is that of two ranks on one machine under the supervisor."""
    assert judge_losses(run.path, undisturbed("zero=2")) == []
    assert judge_folder(run) == []


def test_two_tasks_of_slurm_train_as_two_ranks_on_one_machine(
    named_nodes: Nodes, run: Run, undisturbed: Undisturbed
) -> None:
    named_nodes.finish(run, slurm)
    check_equal(run, undisturbed)
    plan = json.loads((run.path / "plan.json").read_text())
    assert (plan["world_size"], plan["hardware"]["nodes"]) == (2, 2)


def test_torchrun_meets_by_name(named_nodes: Nodes, run: Run, undisturbed: Undisturbed) -> None:
    named_nodes.finish(run, torchrun)
    check_equal(run, undisturbed)


@pytest.mark.parametrize("launcher", [static_torchrun, deepspeed, slurm_by_address])
def test_nodes_without_names_train_too(
    nodes: Nodes, run: Run, undisturbed: Undisturbed, launcher: Launcher
) -> None:
    nodes.finish(run, launcher)
    check_equal(run, undisturbed)


@pytest.mark.parametrize(
    ("launcher", "lost"), [(slurm_by_address, 1), (static_torchrun, 0), (deepspeed_module, 1)]
)
def test_a_lost_node_ends_the_other_and_the_same_commands_go_on(
    nodes: Nodes, run: Run, undisturbed: Undisturbed, launcher: Launcher, lost: int
) -> None:
    nodes.start(run, launcher, slow=0.3)
    fault = 2 * SAVE_STEPS + 3
    moment = run.wait_for("step", fault)
    nodes.kill(lost)
    killed = time.monotonic()
    assert nodes.end(1 - lost, 30) != 0
    assert time.monotonic() - killed < 20, "seconds, not the process group's hour"
    assert nodes.left() == [], "orphans"
    assert run.last_step(moment) == fault - 1
    nodes.finish(run, launcher)
    assert f"checkpoint-{2 * SAVE_STEPS}" in nodes.console(0), "at most save_steps are done again"
    check_equal(run, undisturbed)


def test_a_launcher_that_is_killed_takes_its_ranks_along(nodes: Nodes, run: Run) -> None:
    nodes.start(run, static_torchrun, slow=0.3)
    run.wait_for("step", 3)
    nodes.send(1, signal.SIGKILL)
    assert nodes.end(0, 30) != 0
    assert nodes.left() == []


def test_a_lost_network_ends_both_nodes_and_the_same_commands_go_on(
    nodes: Nodes, run: Run, undisturbed: Undisturbed
) -> None:
    timeout = 6
    nodes.start(run, slurm_by_address, f"launch.hang_timeout={timeout}", slow=0.3)
    run.wait_for("step", 2 * SAVE_STEPS + 3)
    nodes.cable("down")
    cut = time.monotonic()
    codes = [nodes.end(node, 60) for node in range(2)]
    assert codes == [1, 1]
    assert timeout - 1 < time.monotonic() - cut < timeout + 20
    for rank in range(2):
        (stacks,) = run.path.glob(f"stacks-rank{rank}-*.txt")
        assert "train_step" in stacks.read_text(), "where it waits"
        assert f"rank {rank} on" in nodes.console(rank)
        assert "launch.hang_timeout" in nodes.console(rank)
    assert nodes.left() == []
    nodes.cable("up")
    nodes.finish(run, slurm_by_address)
    assert f"checkpoint-{2 * SAVE_STEPS}" in nodes.console(0)
    check_equal(run, undisturbed)


def test_slurms_warning_saves_on_both_nodes_and_ends_with_75(
    nodes: Nodes, run: Run, undisturbed: Undisturbed
) -> None:
    nodes.start(run, slurm_by_address, slow=0.3)
    run.wait_for("step", 10)
    for node in range(2):
        nodes.send(node, signal.SIGUSR1)
    assert [nodes.end(node, 60) for node in range(2)] == [75, 75]
    assert "saved" in nodes.console(0)
    assert {f"checkpoint-{step}" for step in (10, 11)} & run.complete().keys()
    nodes.finish(run, slurm_by_address)
    check_equal(run, undisturbed)


def test_a_run_folder_that_is_not_shared_is_refused_before_training(nodes: Nodes, run: Run) -> None:
    def with_own_disk(node: int, run: Run) -> tuple[list[str], dict[str, str]]:
        command, env = slurm_by_address(node, run)
        if node == 1:
            mount = f'mount -t tmpfs -o mode=755 tmpfs {run.path} && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", mount, "sh", *command]
        return command, env

    run.path.mkdir()
    nodes.start(run, with_own_disk)
    assert [nodes.end(node, 120) for node in range(2)] == [2, 2]
    assert "output_dir has to be on a file system that all nodes share" in nodes.console(0)
    assert not (run.path / "config.yaml").exists(), "nothing has begun"


def test_a_cache_that_is_not_shared_is_refused_before_training(
    nodes: Nodes, run: Run, tmp_path: Path
) -> None:
    def with_own_cache(node: int, run: Run) -> tuple[list[str], dict[str, str]]:
        command, env = slurm_by_address(node, run)
        cache = tmp_path / "cache"
        cache.mkdir(exist_ok=True)
        if node == 1:
            mount = f'mount -t tmpfs -o mode=755 tmpfs {cache} && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", mount, "sh", *command]
        return command, {**env, "LLMTUNE_CACHE": str(cache)}

    nodes.start(run, with_own_cache)
    assert [nodes.end(node, 120) for node in range(2)] == [2, 2]
    assert (
        "paths.cache_dir (and HF_HOME) have to be on a file system that all nodes share"
        in nodes.console(0)
    )


def test_a_hostfile_starts_the_ranks_of_all_nodes_from_one(
    nodes: Nodes, run: Run, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """With stand-ins for ssh and pdsh, which take a namespace for a machine; all else is
    DeepSpeed's runner.
    """
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "ssh").write_text(
        f'#!/bin/sh\ncase "$*" in *"hostname -I"*) echo {ADDRESSES[0]};; esac\n'
    )
    (tools / "pdsh").write_text(
        textwrap.dedent(f"""\
            #!{sys.executable}
            import re, subprocess, sys
            names = {dict(zip(HOSTS, nodes.names, strict=True))!r}
            assert sys.argv[1:3] == ["-S", "-f"] and sys.argv[4] == "-w", sys.argv
            tasks = []
            for number, host in enumerate(sys.argv[5].split(",")):
                text = re.sub("%([n%])", lambda found: str(number) if found[1] == "n" else "%", " ".join(sys.argv[6:]))
                tasks.append(subprocess.Popen(["ip", "netns", "exec", names[host], "sh", "-c", text]))
            sys.exit(max(task.wait() for task in tasks))
            """)  # noqa: E501
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    hosts = tmp_path / "hosts"
    hosts.write_text(f"{HOSTS[0]} slots=1\n{HOSTS[1]} slots=1\n")
    # What a shell would expand, split or end a command at.
    odd = ["chat.prompt='a $HOME `b` \"c\" 100%n'", "chat.system='{x,y};*'"]
    run.overrides = [*run.overrides, *odd]
    run.start(
        f"launch.hostfile={hosts}",
        env={"PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
    )
    assert run.end() == 0, run.console
    assert nodes.left() == []
    check_equal(run, undisturbed)
    config = (run.path / "config.yaml").read_text()
    assert 'a $HOME `b` "c" 100%n' in config
    assert "{x,y};*" in config
    assert json.loads((run.path / "finished.json").read_text())["step"] == STEPS


#: Weights, gradients and states that ZeRO shares make most of a rank's memory.
LARGE = [
    *("tuner=full", "model.config.hidden_size=768", "model.config.intermediate_size=3072"),
    *("model.config.num_hidden_layers=4", "model.config.vocab_size=8192"),
    *("train.global_batch_size=4", "train.max_steps=4", "train.save_steps=2"),
    "train.eval_steps=4",
]


def restarting_torchrun(node: int, run: Run) -> tuple[list[str], dict[str, str]]:
    """It starts the ranks of both nodes again, when one of them fails."""
    command, env = static_torchrun(node, run)
    return [command[0], "--max-restarts=2", *command[1:]], env


@pytest.mark.parametrize("launcher", [slurm_by_address, restarting_torchrun])
def test_memory_that_runs_out_on_one_node_moves_both_to_the_next_rung(
    nodes: Nodes, tmp_path: Path, launcher: Launcher
) -> None:
    """With the exit code that a scheduler answers with the same command, or by torchrun itself."""
    overrides = [*LARGE, f"offload.nvme_path={tmp_path}/nvme"]
    run = Run(tmp_path / "shared", overrides, OVERRIDES)
    launch = partial(with_fault, launcher, "3@1")
    nodes.start(run, launch)
    codes = [nodes.end(node) for node in range(2)]
    if launcher is slurm_by_address:
        assert codes == [75, 75], nodes.console(0) + nodes.console(1)
        for node in range(2):
            assert "out of host memory" in nodes.console(node)
            assert "The same command takes the next rung" in nodes.console(node)
        assert [entry["step"] for entry in read_failures(run)] == [3]
        nodes.start(run, launch)
        codes = [nodes.end(node) for node in range(2)]
    assert codes == [0, 0], nodes.console(0) + nodes.console(1)
    assert "out of memory before (plan.json); taking the rung" in nodes.console(0)
    assert read_failures(run) == [], "adopted"
    plan = json.loads((run.path / "plan.json").read_text())
    (failure,) = plan["history"]
    assert (failure["rank"], failure["step"], failure["pool"]) == (1, 3, "host")
    assert failure["candidate"]["optimizer"] == "none"
    assert plan["placement"]["optimizer"] == "nvme"
    assert nodes.left() == []
    alone = Run(tmp_path / "alone", LARGE)
    alone.finish()
    assert losses(run.path) == pytest.approx(losses(alone.path), abs=1e-4)
    run.clean()


def with_fault(
    launcher: Launcher, fault: str, node: int, run: Run
) -> tuple[list[str], dict[str, str]]:
    """A launcher whose ranks run out of memory where ``fault`` says."""
    command, env = launcher(node, run)
    return command, {**env, "FAULT_MEMORY": fault}


def read_failures(run: Run) -> list[dict[str, Any]]:
    """What ranks have left for the next start."""
    return [json.loads(file.read_text()) for file in run.path.glob(".out-of-memory-*.json")]
