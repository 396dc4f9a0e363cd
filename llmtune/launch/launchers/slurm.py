"""Derive a rank's variables from a Slurm job step: one rank per task of ``srun``.

Slurm's variables: https://slurm.schedmd.com/srun.html (OUTPUT ENVIRONMENT VARIABLES).
"""

import re
from collections.abc import Iterator, Mapping, MutableMapping

from llmtune.errors import MissingPrerequisiteError
from llmtune.units import counted

#: Set by ``srun`` alone, in the tasks of a step; a batch script and a shell of ``salloc`` have only
#: the job's variables.
_STEP_VARIABLES = ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID", "SLURM_STEP_NODELIST")
#: Variables of a launcher; users may set the other two, MASTER_ADDR and MASTER_PORT.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")

#: Below Linux's ephemeral ports (32768 and up), any of which an outgoing connection may use.
_FIRST_PORT, _PORTS = 15000, 16384
#: Ports per job, so that simultaneous steps of one job do not take those of the next job.
_PORTS_PER_JOB = 31

_COUNT = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?")
#: Slurm's own limit of nodes (``MAX_SLURM_NODES``); one name may have brackets for racks and
#: chassis.
_MAX_NODES, _MAX_BRACKETS = 65536, 8
_NUMBER = re.compile(r"[0-9]{1,18}")
_ADVICE = "start one task per GPU: srun --ntasks-per-node=GPUS python -m llmtune ..."


def adopt_slurm(environ: MutableMapping[str, str]) -> bool:
    """Set a launcher's variables where this process is one of several tasks of a step.

    MASTER_ADDR and MASTER_PORT of the user are kept.

    Returns:
        Whether it is one of several tasks.

    Raises:
        MissingPrerequisiteError: Slurm's variables are missing or contradict each other.
    """
    if all(name in environ for name in _RANK_VARIABLES):
        return False
    derived = derive_rank(environ)
    for name, value in derived.items():
        if name in _RANK_VARIABLES or name not in environ:
            environ[name] = value
    return bool(derived)


def derive_rank(environ: Mapping[str, str]) -> dict[str, str]:
    """Return a launcher's variables for this task; empty where there is no step of several tasks.

    Raises:
        MissingPrerequisiteError: Slurm's variables are missing or contradict each other.
    """
    in_step = "SLURM_PROCID" in environ and any(name in environ for name in _STEP_VARIABLES)
    if not in_step or _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") < 2:
        return {}

    # This task, and the tasks of every node.
    world_size = _number(environ, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    rank, local_rank = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID")
    hosts = _hosts(environ)
    counts = _tasks_per_node(environ, len(hosts))
    node = _number(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else _node_of(rank, counts)

    # Refuse numbers that contradict each other: ranks would wait for others for ever.
    if len(counts) != len(hosts) or sum(counts) != world_size:
        raise MissingPrerequisiteError(
            f"Slurm says {world_size} tasks, as {counts} on {counted(len(hosts), 'node')};"
            f" {_ADVICE}"
        )
    if not (0 <= rank < world_size and 0 <= node < len(hosts) and 0 <= local_rank < counts[node]):
        raise MissingPrerequisiteError(
            f"Slurm says task {rank} of {world_size}, {local_rank} of {counts} on node {node};"
            f" {_ADVICE}"
        )
    if environ.get("SLURM_GPUS_PER_TASK", "1").rpartition(":")[2] not in ("0", "1"):
        raise MissingPrerequisiteError(
            f"SLURM_GPUS_PER_TASK={environ['SLURM_GPUS_PER_TASK']}: a rank has one; {_ADVICE}"
        )
    return {
        # torch's variables; DeepSpeed reads the two that begin with CROSS.
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0" if _sees_one_gpu(environ) else str(local_rank),
        "LOCAL_WORLD_SIZE": str(counts[node]),
        "CROSS_RANK": str(node),
        "CROSS_SIZE": str(len(hosts)),
        "MASTER_ADDR": hosts[0],
        "MASTER_PORT": str(_port(environ)),
    }


def expand_hosts(text: str) -> list[str]:
    """Expand ``gpu[01-03,07],big5`` into host names, as ``scontrol show hostnames`` does.

    Raises:
        ValueError: It is no such list.
    """
    hosts: list[str] = []
    for part in _split(text):
        if part.count("[") > _MAX_BRACKETS:
            raise ValueError(part)
        for host in _expand(part):
            hosts.append(host)
            if len(hosts) > _MAX_NODES:
                raise ValueError(text)
    return hosts


def expand_counts(text: str) -> list[int]:
    """Expand ``4(x2),3`` into 4, 4, 3.

    Raises:
        ValueError: It is no such list.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part.strip())
        if match is None:
            raise ValueError(part)
        nodes = int(match[2] or 1)
        if len(counts) + nodes > _MAX_NODES:
            raise ValueError(text)
        counts += [int(match[1])] * nodes
    return counts


def _split(text: str) -> Iterator[str]:
    """Split at the commas outside of brackets."""
    depth, start = 0, 0
    for place, sign in enumerate(text):
        depth += (sign == "[") - (sign == "]")
        if depth not in (0, 1):
            raise ValueError(text)
        if sign == "," and depth == 0:
            yield text[start:place]
            start = place + 1
    if depth:
        raise ValueError(text)
    yield text[start:]


def _expand(part: str) -> Iterator[str]:
    """Expand the first bracket, and then what follows, as in ``rack[1-2]n[1-4]``."""
    before, bracket, rest = part.partition("[")
    if not bracket:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", part):
            raise ValueError(part)
        yield part
        return
    inside, _, after = rest.partition("]")
    for numbers in inside.split(","):
        first, _, last = numbers.partition("-")
        last = last or first
        if not (_NUMBER.fullmatch(first) and _NUMBER.fullmatch(last)) or int(last) < int(first):
            raise ValueError(part)
        for number in range(int(first), int(last) + 1):
            name = f"{before}{number:0{len(first)}d}"
            # With the name so far, because the rest may be empty or begin with a digit.
            yield from _expand(name + after)


def _hosts(environ: Mapping[str, str]) -> list[str]:
    name, text = _text(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    try:
        return expand_hosts(text)
    except ValueError:
        raise MissingPrerequisiteError(
            f"{name}={text!r} is no list of hosts such as node[01-03,07],gpu5"
        ) from None


def _tasks_per_node(environ: Mapping[str, str], nodes: int) -> list[int]:
    names = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
    name, text = _text(environ, *names)
    try:
        counts = expand_counts(text)
    except ValueError:
        raise MissingPrerequisiteError(
            f"{name}={text!r} is no list of task counts such as 4(x2),3"
        ) from None
    if name == "SLURM_NTASKS_PER_NODE" and len(counts) == 1:
        return counts * nodes
    return counts


def _node_of(rank: int, counts: list[int]) -> int:
    """Return the node of a rank under Slurm's block distribution."""
    for node in range(len(counts)):
        if rank < sum(counts[: node + 1]):
            return node
    return len(counts)


def _sees_one_gpu(environ: Mapping[str, str]) -> bool:
    """Tell whether this task sees its own GPU only, as number 0 (``--gpus-per-task=1``)."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible != "" and "," not in visible


def _port(environ: Mapping[str, str]) -> int:
    step = environ.get("SLURM_STEP_ID", "0")
    job = _number(environ, "SLURM_JOB_ID", "SLURM_JOBID")
    offset = job * _PORTS_PER_JOB + (int(step) if _NUMBER.fullmatch(step) else 0)
    return _FIRST_PORT + offset % _PORTS


def _text(environ: Mapping[str, str], *names: str) -> tuple[str, str]:
    """Return the name and value of the first of these variables that is set."""
    for name in names:
        if environ.get(name):
            return name, environ[name]
    raise MissingPrerequisiteError(
        f"{' or '.join(names)} is not set, though this is a task of a Slurm step; {_ADVICE}"
    )


def _number(environ: Mapping[str, str], *names: str) -> int:
    name, text = _text(environ, *names)
    if not _NUMBER.fullmatch(text):
        raise MissingPrerequisiteError(
            f"{name}={text!r} is not a number, though this is a task of a Slurm step"
        )
    return int(text)
