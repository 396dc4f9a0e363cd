"""Readers are given changed files: each is read or refused with a message, and no other exception,
crash or hang comes of it.
"""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.security.fuzz import NATIVE_READERS, READERS, changed, read_one
from tests.support import ROOT

#: For the ordinary suite, always the same ones; and for the slow tier, minutes of others.
SHORT = settings(
    max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
LONG = settings(max_examples=6_000, deadline=20_000, suppress_health_check=list(HealthCheck))
LONG_NATIVE = settings(
    max_examples=10_000, deadline=20_000, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("name", [*READERS, *NATIVE_READERS])
def test_the_files_to_begin_with_are_right(name: str) -> None:
    reader, files = {**READERS, **NATIVE_READERS}[name]
    assert all(read_one(reader, file) for file in files)


@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_is_read_or_refused(name: str) -> None:
    _fuzz(name, SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_changed_files_are_read_or_refused(name: str) -> None:
    _fuzz(name, LONG)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("name", NATIVE_READERS)
def test_many_changed_files_end_no_process(name: str) -> None:
    """In one that a crash may end."""
    child = Child(name)

    @LONG_NATIVE
    @given(changed(NATIVE_READERS[name][1]))
    def fuzz(content: bytes) -> None:
        answer = child.ask(content)
        assert answer in ("read", "refused"), (answer, content)

    try:
        fuzz()
    finally:
        child.end()


class Child:
    """A process that reads files, started again when one ended it."""

    def __init__(self, name: str):
        self._command = [sys.executable, "-m", "tests.security.fuzz", name]
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, content: bytes) -> str:
        """What became of a file."""
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(self._command, cwd=ROOT, stdin=pipe, stdout=pipe)
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(struct.pack("<I", len(content)) + content)
        process.stdin.flush()
        answer = process.stdout.readline().decode().strip()
        if not answer:
            self._process = None
            return f"ended the process with {process.wait()}"
        return answer

    def end(self) -> None:
        """No process is left."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def _fuzz(name: str, how: settings) -> None:
    reader, files = READERS[name]

    @how
    @given(changed(files))
    def fuzz(content: bytes) -> None:
        read_one(reader, content)

    fuzz()


@SHORT
@given(st.text(max_size=200))
def test_any_text_is_a_row_or_none(text: str) -> None:
    for name in ("JSON lines", "JSON", "CSV", "hostfile", "Slurm", "manifest", "adapter"):
        read_one(READERS[name][0], text.encode("utf-8", "surrogatepass"))
