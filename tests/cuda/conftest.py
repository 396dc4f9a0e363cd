"""The compiled pretend GPU, which tests share."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import ROOT


@pytest.fixture(scope="session")
def pretend_gpu(nursery: None) -> None:
    """Compile it once; in a process of its own, since loading it changes torch for good."""
    command = [sys.executable, "-c", "from tests.cuda import pretend; pretend.load_device()"]
    subprocess.run(command, cwd=ROOT, check=True)
