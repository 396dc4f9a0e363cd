"""Findings about folders whose content other users of the machine could have written."""

import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from llmtune.doctor.finding import Finding
from llmtune.launch.launchers.environment import extensions_dir
from llmtune.launch.preflight.deepspeed_ops import find_foreign_op
from llmtune.security.trust import find_owner_problem, owner_command


def inspect_owners(cache: Path) -> Iterator[Finding]:
    """Tell whether other users may have written what llmtune loads or trusts."""
    findings = [*_inspect_folders(cache), *_inspect_parents(cache)]
    yield from findings
    if not findings:
        yield Finding(
            what="owners",
            state="ok",
            message="compiled ops, cache and Python are this user's or root's",
        )


def _inspect_folders(cache: Path) -> Iterator[Finding]:
    folders = {
        "DeepSpeed's compiled ops": find_foreign_op() or extensions_dir(),
        "cache": cache,
        "Python": Path(sys.prefix),
    }
    for name, folder in folders.items():
        problem = find_owner_problem(folder) if folder.exists() else None
        if problem is not None:
            # Whoever may write to Python's own folder can do worse than change what llmtune keeps
            # elsewhere.
            yield Finding(
                what="owners",
                state="note" if name == "Python" else "bad",
                message=f"{name}: {folder} {problem}",
                command=owner_command(folder),
            )


def _inspect_parents(cache: Path) -> Iterator[Finding]:
    """Find parents in which anybody can rename a folder and put another in its place."""
    for folder in dict.fromkeys((extensions_dir(), cache)):
        for parent in filter(Path.exists, folder.absolute().parents):
            mode = parent.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                yield Finding(
                    what="owners",
                    state="note",
                    message=f"{parent}: anybody may put another folder in the place of {folder}",
                    command=f"chmod o-w {parent}",
                )
