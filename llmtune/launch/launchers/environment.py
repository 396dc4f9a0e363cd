"""Set the environment variables of ranks, as DeepSpeed's launcher does, and read a launcher's."""

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
    """Set variables before torch and DeepSpeed are imported; the user's own values win.

    Only DS_ACCELERATOR is overwritten: the plan followed it unless a key overruled it, and was made
    for ``accelerator``.
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
        # DeepSpeed's CPU accelerator takes it for the number of its devices.
        defaults["LOCAL_SIZE"] = str(ranks_on_node)
    else:
        set_allocator_default()
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def set_allocator_default() -> None:
    """Set torch's allocators on CUDA, which read the variable at their first use; the user's wins.

    Segments that grow leave no holes. Pinned memory is otherwise rounded up to a power of two: the
    gradients of a 70B model on a host, 17.6 GB per rank, would take 34.4. Exact sizes apply from
    16 MiB on.
    """
    # torch prefers the old name where both are set: ours must not be set beside the user's new one.
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        exact = f",{EXACT_PINS}:16" if knows_exact_pins() else ""
        os.environ[ALLOCATOR_VARIABLES[0]] = f"expandable_segments:True{exact}"


@contextlib.contextmanager
def restored_environment() -> Iterator[None]:
    """In the block, set variables for child processes; this process gets its own back after it."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def return_freed_memory() -> None:
    """Make malloc return large blocks at once, in ranks that are started afterwards.

    Where states pass through memory on their way to NVMe, glibc otherwise keeps freed memory: a CPU
    rank of a 126 M model grew to 2.3 GB instead of 1.5. It costs page faults, so that rungs with
    enough memory do without.
    """
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 * 2**20))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(128 * 2**20))


def use_own_ninja() -> None:
    """Put this environment's programs first, as activating it would.

    Two versions of ninja hash the same command differently. An environment that is activated only
    sometimes would compile every op again at each change, half a minute each.
    """
    own = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if path.split(os.pathsep)[0] != own:
        os.environ["PATH"] = own + os.pathsep + path


def set_thread_default(ranks_on_node: int) -> None:
    """Share the cores among the ranks; torch reads the variable once, when it is first imported.

    The cores of a process that starts ranks are for all of them. A rank may have been bound to
    cores, as by Slurm: it takes these, and no more than its share of the machine.
    """
    cores = len(os.sched_getaffinity(0))
    if "RANK" in os.environ:
        threads = min(cores, (os.cpu_count() or 1) // ranks_on_node)
    else:
        threads = cores // ranks_on_node
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))


def launched_ranks_on_node() -> int:
    """Return the ranks that a foreign launcher started on this machine.

    By torchrun's variable, by DeepSpeed's, or all there are.
    """
    return int(
        os.environ.get("LOCAL_WORLD_SIZE")
        or os.environ.get("LOCAL_SIZE")
        or os.environ["WORLD_SIZE"]
    )


def launched_nodes() -> int:
    """Return the number of machines with ranks of a foreign launcher.

    By DeepSpeed's variable, by torchrun's, or by the ranks per machine.
    """
    given = os.environ.get("CROSS_SIZE") or os.environ.get("GROUP_WORLD_SIZE")
    return int(given) if given else -(-int(os.environ["WORLD_SIZE"]) // launched_ranks_on_node())


def set_network_default() -> None:
    """Make gloo use the network interface that leads to rank 0's machine; the user's choice wins.

    By itself it takes the address of this machine's own name, which many an ``/etc/hosts`` sets to
    the loopback: ranks of other machines then connect to themselves.
    """
    if launched_nodes() > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        name = interface_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_towards(host: str, port: int) -> str | None:
    """Return the network interface for packets to ``host``.

    Where that is the loopback, the only other one; None where there are several.
    """
    names = {
        address.address.split("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
    }

    # The address that the kernel would send from.
    own = "127.0.0.1"
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, target = found[0]
        with socket.socket(family, kind, protocol) as probe:
            # Connecting a datagram socket sends nothing.
            probe.connect(target)
            own = probe.getsockname()[0].split("%")[0]
    loopback = names.get("127.0.0.1")
    if own in names and names[own] != loopback:
        return names[own]

    # The loopback: take the only other interface that is up.
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
    """Return the folder of compiled DeepSpeed ops.

    It is in the Python environment, because two environments with one folder rebuild each other's
    ops. An environment that others may write to is not used: every rank loads the ops as code.

    Raises:
        MissingPrerequisiteError: It would be in the home of a user who has none.
    """
    if named := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(named)
    prefix = Path(sys.prefix)
    is_environment = sys.prefix != sys.base_prefix and os.access(prefix, os.W_OK)
    if is_environment and find_owner_problem(prefix) is None:
        return prefix / "torch_extensions"
    try:
        return Path.home() / ".cache" / "torch_extensions"
    except RuntimeError as error:
        raise MissingPrerequisiteError(
            f"HOME is not set, and this user (uid {os.getuid()}) has no home for DeepSpeed's"
            " compiled ops; name a folder of your own with TORCH_EXTENSIONS_DIR"
        ) from error


def rank_environment(rank: int, world_size: int, port: int, failure_dir: Path) -> dict[str, str]:
    """Return the whole environment of one rank of a run on this machine alone.

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
    """Return variables that make gloo and NCCL listen on the loopback interface alone.

    They override what is set for runs on several machines. By themselves, gloo takes the address of
    the machine's name, and NCCL the first interface that is not the loopback, where anybody could
    connect to the run. Empty where there is no loopback interface.
    """
    names = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == "127.0.0.1" for address in addresses)
    ]
    if not names:
        return {}
    # Without the equals sign, NCCL takes every interface whose name begins so.
    return {"GLOO_SOCKET_IFNAME": names[0], "NCCL_SOCKET_IFNAME": f"={names[0]}"}


def remove_shared_buffers(port: int, address: str = "127.0.0.1") -> None:
    """Delete the files that DeepSpeed's CPU collectives leave in ``/dev/shm``: 69 MB per rank.

    They are named by user, address and port of the process group (``csrc/cpu/comm/shm.cpp``). Ranks
    open them when they join it; after that the names can go, and the memory is freed with the last
    rank, however it ends.
    """
    for file in Path("/dev/shm").glob(
        f"deepspeed_allreduce_buffer_{os.getuid()}_{glob.escape(address)}_{port}_*"
    ):
        with contextlib.suppress(OSError):
            file.unlink()


def hold_port() -> socket.socket:
    """Reserve a free TCP port until the returned socket is closed; others may still listen on it.

    Linux lets two sockets with SO_REUSEADDR, which torch's store sets too, share a port if at most
    one of them listens.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held
