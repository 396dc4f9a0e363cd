"""Ranks that nobody is known to have started meet within a minute, or end with advice instead of
waiting without a word.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

from llmtune.errors import MissingPrerequisiteError
from llmtune.launch.launchers.launcher import Launcher

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_KEY = "llmtune/ranks that have come"
_LOOK_SECONDS = 0.1


def await_ranks(launcher: Launcher) -> TCPStore | None:
    """Wait for the other ranks; at once where the launcher sees to them.

    Returns:
        The store at which they met, to be held until the process group has been made: its server is
        the same one then.

    Raises:
        MissingPrerequisiteError: Some did not come in ``launcher.meet_seconds``, or cannot be
            reached.
    """
    seconds = launcher.meet_seconds
    if seconds is None:
        return None
    from torch.distributed import TCPStore

    deadline = time.monotonic() + seconds
    host, _, port = launcher.meeting.rpartition(":")
    try:
        store = TCPStore(
            host,
            int(port),
            launcher.world_size,
            is_master=launcher.rank == 0,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
        here = store.add(_KEY, 1)
        while here < launcher.world_size and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
            here = store.add(_KEY, 0)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise _given_up(
            launcher, f"rank {launcher.rank} cannot meet the others at {launcher.meeting}: {reason}"
        ) from error
    if here < launcher.world_size:
        raise _given_up(
            launcher,
            f"{here} of {launcher.world_size} ranks came to {launcher.meeting} within"
            f" {seconds:g} s",
        )
    return store


def _given_up(launcher: Launcher, what: str) -> MissingPrerequisiteError:
    return MissingPrerequisiteError(f"{what}. {launcher.unattended}")
