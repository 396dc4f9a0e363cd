"""Findings about DeepSpeed's compiled ops: which are built, and locks that killed builds left."""

import functools
import os
from collections.abc import Iterator

from llmtune.doctor.finding import Finding, remove_files
from llmtune.launch.launchers.environment import extensions_dir
from llmtune.launch.preflight.deepspeed_ops import (
    build_in_child,
    is_built,
    needed_ops,
    stale_locks,
)


def inspect_locks() -> Iterator[Finding]:
    """Find locks of builds that were killed."""
    locks = stale_locks()
    for lock in locks:
        yield Finding(
            what="op locks",
            state="note",
            message=(
                f"{lock}: left by a build that was killed; the next run of llmtune removes it,"
                " DeepSpeed alone would hang on it"
            ),
            command=f"rm {lock}",
            fix=functools.partial(remove_files, [lock]),
        )
    if not locks:
        yield Finding(what="op locks", state="ok", message=f"none below {extensions_dir()}")


def inspect_ops() -> Iterator[Finding]:
    """Tell which of the ops that a run may need are compiled."""
    for name in needed_ops(os.environ.get("DS_ACCELERATOR") or _accelerator(), None):
        short = name.removesuffix("Builder")
        if is_built(name):
            yield Finding(what="ops", state="ok", message=f"{short} is compiled")
            continue
        yield Finding(
            what="ops",
            state="note",
            message=f"{short} is not compiled yet: the first run that needs it waits for minutes",
            command=f"python -P -m llmtune.launch.preflight.deepspeed_ops {name}",
            fix=functools.partial(build_in_child, name),
        )


def _accelerator() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
