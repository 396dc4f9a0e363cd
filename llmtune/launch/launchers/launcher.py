"""Find out which launcher, if any, started this process as one of several ranks.

The variables are those of ``torch.distributed``'s ``env://``. Launchers also set LOCAL_RANK, except
Kubernetes' training operator, which starts one process per pod:
https://www.kubeflow.org/docs/components/trainer/legacy-v1/user-guides/pytorch/
"""

import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

from llmtune.errors import MissingPrerequisiteError
from llmtune.launch.launchers.slurm import adopt_slurm

#: Time for all ranks to join, where nothing shows that a launcher starts them.
UNATTENDED_SECONDS = 60.0

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Number of processes, as launchers of Open MPI, and of MPICH and Intel MPI, set it.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
#: Set in the tasks of ``srun --pty``.
_SLURM_TERMINAL = "SLURM_PTY_PORT"
_NUMBER = re.compile(r"[0-9]{1,18}")
_ADVICE = "let torchrun, deepspeed or srun start the ranks (docs/nodes.md)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """The launcher that started this process as one of several ranks."""

    name: str
    rank: int
    world_size: int
    meeting: str
    """Host and port of rank 0."""
    stays: bool = False
    """It is the parent process, and lives until its ranks end."""
    unattended: str = ""
    """Advice for the case that the other ranks do not join; empty where a launcher watches them."""

    @property
    def meet_seconds(self) -> float | None:
        """Seconds to wait for the other ranks; None where a launcher watches them."""
        return UNATTENDED_SECONDS if self.unattended else None

    def describe(self) -> str:
        """Describe the launcher, and which ranks this one waits for."""
        text = f"{self.name}: rank {self.rank} of {self.world_size}"
        others = self.world_size - 1
        if others:
            text += f", waiting for {others} other{'s' if others > 1 else ''} at {self.meeting}"
        return text + (f" for {UNATTENDED_SECONDS:g} s" if self.unattended else "")


def adopt_launcher(
    environ: MutableMapping[str, str], say: Callable[[str], None]
) -> Launcher | None:
    """Find the launcher of this process, and add the variables that it did not set.

    Args:
        say: Prints to the user what was found.

    Returns:
        The launcher; None where llmtune itself starts the ranks.

    Raises:
        MissingPrerequisiteError: The variables contradict each other, or processes were started to
            train together without the variables that they need.
    """
    from_slurm = adopt_slurm(environ)
    # Without a rank there is no launcher; one that sets other variables is refused.
    if not {"RANK", "WORLD_SIZE"} <= environ.keys():
        _refuse_others(environ)
        for name in ("RANK", "WORLD_SIZE"):
            if name in environ:
                say(
                    f"{name}={environ[name]} is set, and the other variables of a launcher are not:"
                    " starting the ranks here"
                )
        return None
    # A single rank needs no launcher, and is none of torchrun's or DeepSpeed's.
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise MissingPrerequisiteError(
            f"RANK={rank} is not one of WORLD_SIZE={world_size} ranks; {_unset(environ)}"
        )
    name = _name(environ, from_slurm)
    if world_size == 1 and name not in (_TORCHRUN, _DEEPSPEED):
        say(f"{_given(environ)}: one rank, which needs no launcher: starting the ranks here")
        return None
    # Several ranks need a place to meet.
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise MissingPrerequisiteError(
            f"{_given(environ)}, as by a launcher, but not {' and '.join(missing)}: where do the"
            f" {world_size} ranks meet? {_unset(environ)}"
        )
    if not 0 < _number(environ, "MASTER_PORT") < 1 << 16:
        raise MissingPrerequisiteError(
            f"MASTER_PORT={environ['MASTER_PORT']} is no port; {_unset(environ)}"
        )
    _complete_node(environ, name)
    launcher = Launcher(
        name=name,
        rank=rank,
        world_size=world_size,
        meeting=f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']}",
        stays=name in (_TORCHRUN, _DEEPSPEED),
        unattended=_advice_alone(environ, name),
    )
    # Each pod and each shell has its own console; the ranks of the other launchers share one.
    if rank == 0 or name in (_KUBERNETES, _VARIABLES_ALONE):
        say(launcher.describe())
    return launcher


_TORCHRUN, _DEEPSPEED, _SLURM = "torchrun", "DeepSpeed's launcher", "Slurm"
_KUBERNETES, _VARIABLES_ALONE = (
    "Kubernetes, one rank a pod",
    "variables of a launcher in the environment",
)


def _name(environ: Mapping[str, str], from_slurm: bool) -> str:
    if "TORCHELASTIC_RUN_ID" in environ:
        return _TORCHRUN
    if {"CROSS_RANK", "LOCAL_SIZE"} <= environ.keys():
        return _DEEPSPEED
    if from_slurm:
        return _SLURM
    if "KUBERNETES_SERVICE_HOST" in environ and "LOCAL_RANK" not in environ:
        return _KUBERNETES
    return _VARIABLES_ALONE


def _advice_alone(environ: Mapping[str, str], name: str) -> str:
    """Return advice for ranks that may never join; empty where a launcher watches them."""
    if name == _VARIABLES_ALONE:
        return f"The environment says {_given(environ)}. {_unset(environ)}"
    if name == _SLURM and _SLURM_TERMINAL in environ:
        # An interactive shell on a node, and all that is started in it, has the variables of its
        # step.
        return (
            f"This is task {environ['SLURM_PROCID']} of srun --pty. In a shell that it opened,"
            " start the ranks with srun, or with env -u SLURM_PROCID python -m llmtune, which"
            " starts those of this machine itself"
        )
    return ""


def _complete_node(environ: MutableMapping[str, str], name: str) -> None:
    """Set LOCAL_RANK where it is missing: this is the only rank of its machine."""
    if "LOCAL_RANK" in environ:
        _number(environ, "LOCAL_RANK")
        return
    ranks = environ.get("LOCAL_WORLD_SIZE") or environ.get("PET_NPROC_PER_NODE", "1")
    if _NUMBER.fullmatch(ranks) and int(ranks) > 1:
        advice = _ADVICE
        if name == _KUBERNETES:
            advice = "take torchrun -m llmtune ... as the command, which starts them"
        raise MissingPrerequisiteError(
            f"{_given(environ)} without LOCAL_RANK, and {ranks} ranks on this machine: {advice}"
        )
    environ["LOCAL_RANK"], environ["LOCAL_WORLD_SIZE"] = "0", "1"


def _refuse_others(environ: Mapping[str, str]) -> None:
    """Refuse launchers whose processes would not know of each other."""
    for name in _MPI_SIZES:
        if environ.get(name, "1") not in ("0", "1"):
            raise MissingPrerequisiteError(
                f"{name}={environ[name]}: MPI started {environ[name]} processes, which would each"
                f" train alone; {_ADVICE}"
            )
    # MIN:MAX in elastic jobs. The training operator sets it for torchrun as the pod's command.
    nodes = environ.get("PET_NNODES", "1").rpartition(":")[2]
    if nodes != "1" and "TORCHELASTIC_RUN_ID" not in environ:
        raise MissingPrerequisiteError(
            f"PET_NNODES={environ['PET_NNODES']} is set for torchrun, without which each machine"
            " would train alone: take torchrun -m llmtune ... as the command"
        )


def _number(environ: Mapping[str, str], name: str) -> int:
    if not _NUMBER.fullmatch(environ[name]):
        raise MissingPrerequisiteError(
            f"{name}={environ[name]!r} is not a number; {_unset(environ)}"
        )
    return int(environ[name])


def _given(environ: Mapping[str, str]) -> str:
    return " ".join(f"{name}={environ[name]}" for name in _VARIABLES if name in environ)


def _unset(environ: Mapping[str, str]) -> str:
    names = " ".join(name for name in _VARIABLES if name in environ)
    return f"if they were left in this shell: unset {names}. If they are meant: {_ADVICE}"
