"""Find what on this machine would stop a run, each finding with the command that fixes it."""

from collections.abc import Iterator
from pathlib import Path

from llmtune.doctor.finding import Finding
from llmtune.doctor.ops import inspect_locks, inspect_ops
from llmtune.doctor.ownership import inspect_owners
from llmtune.doctor.resources import inspect_credentials, inspect_disks, inspect_limits
from llmtune.doctor.software import inspect_compiler, inspect_cuda, inspect_packages


def inspect_machine(cache: Path) -> Iterator[Finding]:
    """Yield every finding, one after the other, because some take seconds.

    Args:
        cache: The folder of ``paths.cache_dir``.
    """
    yield from inspect_packages()
    yield from inspect_cuda()
    yield from inspect_compiler()
    owners = list(inspect_owners(cache))
    yield from owners
    # Ops that others may have written are not loaded.
    if all(finding.state != "bad" for finding in owners):
        yield from inspect_locks()
        yield from inspect_ops()
    yield from inspect_limits()
    yield from inspect_disks(cache)
    yield from inspect_credentials()
