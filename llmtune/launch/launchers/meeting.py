"""Let ranks without a known launcher meet within a minute, or end with advice."""

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
    """Wait for the other ranks; return at once where a launcher watches them.

    Returns:
        The store at which they met. Hold it until the process group exists, which uses its server.

    Raises:
        MissingPrerequisiteError: Some did not join within ``launcher.meet_seconds``, or cannot be
            reached.
    """
    seconds = launcher.meet_seconds
    if seconds is None:
        return None
    from torch.distributed import TCPStore

    # Rank 0 serves a store, in which every rank counts itself once.
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
        joined = store.add(_KEY, 1)
        while joined < launcher.world_size and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
            joined = store.add(_KEY, 0)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise _given_up(
            launcher, f"rank {launcher.rank} cannot meet the others at {launcher.meeting}: {reason}"
        ) from error
    if joined < launcher.world_size:
        raise _given_up(
            launcher,
            f"{joined} of {launcher.world_size} ranks came to {launcher.meeting} within"
            f" {seconds:g} s",
        )
    return store


def _given_up(launcher: Launcher, what: str) -> MissingPrerequisiteError:
    return MissingPrerequisiteError(f"{what}. {launcher.unattended}")
