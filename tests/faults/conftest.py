"""Faults: a few of them in the ordinary suite, the whole table with ``scripts/test.sh --slow``."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import Reference, Run, Table, read_reference

Undisturbed = Callable[..., Reference]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The finished run that a disturbed one must equal, by its overrides; each is trained once."""
    known: dict[tuple[str, ...], Reference] = {}

    def find(*overrides: str) -> Reference:
        if overrides not in known:
            run = Run(tmp_path_factory.mktemp("undisturbed"), overrides)
            run.finish()
            assert not run.alive()
            known[overrides] = read_reference(run.path)
        return known[overrides]

    return find


@pytest.fixture(scope="session")
def table() -> Table:
    """Where ``LLMTUNE_FAULT_TABLE`` says, for ``python -m tests.faults.table``."""
    name = os.environ.get("LLMTUNE_FAULT_TABLE")
    return Table(Path(name) if name else None)


@pytest.fixture(scope="session", autouse=True)
def _terminal_signals_count() -> None:
    """Under ``nohup`` a child would inherit that SIGHUP is ignored, and rightly live on."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
