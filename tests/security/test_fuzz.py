"""Readers are given changed files: each is read or refused with a message, and no other exception, crash or hang comes of it."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.security.fuzz import NATIVE_READERS, READERS, changed, read_one
from tests.support import ROOT

#: For the ordinary suite, always the same ones; and for the slow tier, minutes of others.
SHORT = settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(max_examples=6_000, deadline=20_000, suppress_health_check=list(HealthCheck))
LONG_NATIVE = settings(max_examples=10_000, deadline=20_000, suppress_health_check=list(HealthCheck))


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
    files = NATIVE_READERS[name][1]
    with _child(name) as child:

        @LONG_NATIVE
        @given(changed(files))
        def fuzz(content: bytes) -> None:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(struct.pack("<I", len(content)) + content)
            child.stdin.flush()
            answer = child.stdout.readline()
            assert answer in (b"read\n", b"refused\n"), (child.wait(), content)

        fuzz()


def _fuzz(name: str, how: settings) -> None:
    reader, files = READERS[name]

    @how
    @given(changed(files))
    def fuzz(content: bytes) -> None:
        read_one(reader, content)

    fuzz()


@contextmanager
def _child(name: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.security.fuzz", name]
    child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@SHORT
@given(st.text(max_size=200))
def test_any_text_is_a_row_or_none(text: str) -> None:
    for name in ("JSON lines", "JSON", "CSV", "hostfile", "Slurm", "manifest", "adapter"):
        read_one(READERS[name][0], text.encode("utf-8", "surrogatepass"))
