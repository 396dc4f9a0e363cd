"""Make a rank end when the launcher or supervisor that started it ends."""

import os
from pathlib import Path

from llmtune.errors import EXIT_UNEXPECTED
from llmtune.launch.processes.rank_process import SUPERVISOR
from llmtune.process import die_with_parent


def follow_launcher() -> None:
    """Make this rank end with its launcher, also if the launcher ended before this call.

    A process is not told that its parent ended earlier; it only sees that another adopted it.
    """
    die_with_parent()
    parent = os.getppid()
    if not may_be_launcher(parent):
        message = (
            f"the launcher of this rank has ended (process {parent} is no launcher): ending too"
        )
        os.write(2, f"{message}\n".encode())
        os._exit(EXIT_UNEXPECTED)


def may_be_launcher(pid: int) -> bool:
    """Tell whether a process can have started a rank.

    It is a Python program, or a wrapper between that and the rank, which has the rank's variables.
    Processes that adopt orphans (``init``, ``systemd``, ``tini``, a shell) are neither.
    """
    folder = Path(f"/proc/{pid}")
    try:
        if "python" in (folder / "exe").readlink().name:
            return True
        return b"\0LOCAL_RANK=" in b"\0" + (folder / "environ").read_bytes()
    except OSError:
        # Another user's process, or one in another container. No rank is started by the first
        # process of another user.
        return pid != 1


def die_with_supervisor() -> None:
    """Make this rank end with its supervisor, also if the supervisor ended before this call.

    A rank calls this before anything else.
    """
    die_with_parent()
    parent = os.getppid()
    if int(os.environ.get(SUPERVISOR, parent)) != parent:
        os._exit(EXIT_UNEXPECTED)
