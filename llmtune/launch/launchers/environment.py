"""The environment variables of a rank, as DeepSpeed's launcher would set them, and what a launcher
left in ours.
"""

from __future__ import annotations

import contextlib
import glob
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from llmtune.errors import MissingPrerequisiteError
from llmtune.plan.devices.gpus import ALLOCATOR_VARIABLES, EXACT_PINS, knows_exact_pins
from llmtune.security.trust import find_owner_problem

#: Names the folder of an attempt's :mod:`~llmtune.storage.rank_files`.
FAILURE_DIR = "LLMTUNE_FAILURE_DIR"


def set_defaults(accelerator: str, ranks_on_node: int) -> None:
    """Variables that must stand before torch and DeepSpeed are imported; what the user has set
    wins.

    Not so DS_ACCELERATOR: the plan has honored it where it was not overruled, and was made for
    ``accelerator``.
    """
    os.environ["DS_ACCELERATOR"] = accelerator
    use_own_ninja()
    defaults = {
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(extensions_dir()),
        "DEEPSPEED_TIMEOUT": "60",
        "PYTHONUNBUFFERED": "1",
    }
    set_thread_default(ranks_on_node)
    if accelerator == "cpu":
        # What the CPU accelerator counts as its devices.
        defaults["LOCAL_SIZE"] = str(ranks_on_node)
    else:
        set_allocator_default()
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def set_allocator_default() -> None:
    """Settings of torch's allocators on CUDA, which reads them once, when it is first used; what
    the user has set wins.

    Segments that grow leave no holes behind. And pinned memory is rounded up to a power of two
    unless the allocator is told not to, from 16 MiB on: the gradients of a 70B model on a host,
    17.6 GB a rank, would take 34.4.
    """
    # The old name wins where both are set, so that ours must not stand beside the user's new one.
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        exact = f",{EXACT_PINS}:16" if knows_exact_pins() else ""
        os.environ[ALLOCATOR_VARIABLES[0]] = f"expandable_segments:True{exact}"


@contextlib.contextmanager
def restored_environment() -> Iterator[None]:
    """Variables that are set in the block are for the processes that are started in it: this one
    has all cores.
    """
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def return_freed_memory() -> None:
    """Have malloc give large blocks back at once, in the ranks to come.

    Where states pass through memory on their way to NVMe, glibc otherwise keeps what was freed: a
    CPU rank of a 126 M model grew to 2.3 GB instead of 1.5. It costs page faults, so that rungs
    which have the memory do without.
    """
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 * 2**20))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(128 * 2**20))


def use_own_ninja() -> None:
    """Put this environment's programs first, as activating it would.

    Two versions of ninja hash the same command differently, so an environment that is sometimes
    activated and sometimes not compiles every op anew at each change, half a minute each.
    """
    own = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if path.split(os.pathsep)[0] != own:
        os.environ["PATH"] = own + os.pathsep + path


def set_thread_default(ranks_on_node: int) -> None:
    """Share the cores among the ranks; torch reads the variable once, when it is first imported.

    Those of a process that starts ranks are for all of them. A rank may have been given cores of
    its own, as Slurm does: then it takes these, and no more than its share of the machine.
    """
    mine, share = len(os.sched_getaffinity(0)), (os.cpu_count() or 1) // ranks_on_node
    threads = min(mine, share) if "RANK" in os.environ else mine // ranks_on_node
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))


def launched_ranks_on_node() -> int:
    """Ranks that a foreign launcher started on this machine: torchrun's variable, DeepSpeed's, or
    all there are.
    """
    return int(
        os.environ.get("LOCAL_WORLD_SIZE")
        or os.environ.get("LOCAL_SIZE")
        or os.environ["WORLD_SIZE"]
    )


def launched_nodes() -> int:
    """Machines that a foreign launcher started ranks on: DeepSpeed's variable, torchrun's, or by
    their number.
    """
    given = os.environ.get("CROSS_SIZE") or os.environ.get("GROUP_WORLD_SIZE")
    return int(given) if given else -(-int(os.environ["WORLD_SIZE"]) // launched_ranks_on_node())


def set_network_default() -> None:
    """Have gloo use the network interface that leads to rank 0's machine; what the user has set
    wins.

    By itself it takes the address of this machine's own name, which in many an ``/etc/hosts`` is
    that of the loopback: the ranks of other machines then connect to themselves.
    """
    if launched_nodes() > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        name = interface_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_towards(host: str, port: int) -> str | None:
    """The network interface through which packets to ``host`` leave; where that is the loopback,
    the only other one.

    None where that is not clear.
    """
    names = {
        address.address.split("%")[0]: name
        for name, all_ in psutil.net_if_addrs().items()
        for address in all_
    }
    own = "127.0.0.1"
    with contextlib.suppress(OSError):
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[
            0
        ]
        with socket.socket(family, kind, protocol) as probe:
            # Of a datagram socket, this sends nothing.
            probe.connect(target)
            own = probe.getsockname()[0].split("%")[0]
    loopback = names.get("127.0.0.1")
    if own in names and names[own] != loopback:
        return names[own]
    states = psutil.net_if_stats()
    others = {
        name
        for name, addresses in psutil.net_if_addrs().items()
        if name != loopback
        and states[name].isup
        and any(a.family == socket.AF_INET for a in addresses)
    }
    return others.pop() if len(others) == 1 else None


def extensions_dir() -> Path:
    """Compiled DeepSpeed ops, one folder an environment: two that share one rebuild each other's
    ops for ever.

    An environment that others may write to has none: what is compiled is loaded into every rank.

    Raises:
        MissingPrerequisiteError: It is to lie in the home of a user who has none.
    """
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    own = Path(sys.prefix)
    if (
        sys.prefix != sys.base_prefix
        and os.access(own, os.W_OK)
        and find_owner_problem(own) is None
    ):
        return own / "torch_extensions"
    try:
        return Path.home() / ".cache" / "torch_extensions"
    except RuntimeError as error:
        raise MissingPrerequisiteError(
            f"HOME is not set, and this user (uid {os.getuid()}) has no home for DeepSpeed's"
            " compiled ops; name a folder of your own with TORCH_EXTENSIONS_DIR"
        ) from error


def rank_environment(rank: int, world_size: int, port: int, failure_dir: Path) -> dict[str, str]:
    """The whole environment of one rank of this node, whose ranks talk to each other alone.

    They meet at a file (:mod:`llmtune.storage.rank_files`); the address and the port only name
    their shared memory.
    """
    return {
        **os.environ,
        **loopback_only(),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "CROSS_RANK": "0",
        "CROSS_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        FAILURE_DIR: str(failure_dir),
    }


def loopback_only() -> dict[str, str]:
    """Have gloo and NCCL listen on the loopback interface alone, whatever is set for runs on
    several machines.

    By themselves they take the address of the machine's name, and NCCL the first interface that is
    not the loopback; what listens there takes part in the run of whoever connects. Empty where
    there is no such interface.
    """
    names = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == "127.0.0.1" for address in addresses)
    ]
    # Without the sign of equality, NCCL takes every interface whose name begins so.
    return {"GLOO_SOCKET_IFNAME": names[0], "NCCL_SOCKET_IFNAME": f"={names[0]}"} if names else {}


def remove_shared_buffers(port: int, address: str = "127.0.0.1") -> None:
    """Delete what DeepSpeed's CPU collectives leave in ``/dev/shm``: 69 MB a rank and run, of
    memory, for ever.

    The files are named by user, address and port of the process group (``csrc/cpu/comm/shm.cpp``).
    Ranks open them once, when they join it; behind that the names can go, and the memory goes with
    the last rank, however it ends.
    """
    for file in Path("/dev/shm").glob(
        f"deepspeed_allreduce_buffer_{os.getuid()}_{glob.escape(address)}_{port}_*"
    ):
        with contextlib.suppress(OSError):
            file.unlink()


def hold_port() -> socket.socket:
    """A socket that holds a free TCP port until it is closed: nobody else is given it, and somebody
    could still listen on it.

    Linux lets two sockets with SO_REUSEADDR, which torch's store sets too, share a port of which
    one at the most listens.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held
