"""What tests on the pretend GPU rely on: it refuses, counts and runs out as CUDA does."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support import ROOT

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("pretend_gpu")]

SCRIPT = """
import json, torch
from tests.cuda import pretend

device = pretend.register()
found = {}

def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def waits_of(call):
    device.reset_counts()
    call()
    return sum(count for kind, count in device.counts().items() if kind != "kernels")

a = torch.arange(6.0, device=pretend.NAME)
found["sum"] = (a * 2).sum().cpu().item()
found["host scalar"] = error_of(lambda: a + torch.tensor(1.0))
found["host tensor"] = error_of(lambda: a + torch.ones(6))
found["other device"] = error_of(lambda: a + torch.ones(6, device=pretend.NAME + ":1"))
found["kernel"] = waits_of(lambda: a * 2)
found["item"] = waits_of(lambda: a.sum().item())
found["nonzero"] = waits_of(lambda: a.nonzero())
found["copy to host"] = waits_of(lambda: a.cpu())
device.limit(0, device.memory(0)[0] + 1000)
found["fits"] = error_of(lambda: torch.empty(100, device=pretend.NAME))
found["full"] = error_of(lambda: torch.empty(1000, device=pretend.NAME))
print(json.dumps(found))
"""


def test_it_behaves_as_cuda_does() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["sum"] == 30
    assert found["host scalar"] is found["fits"] is None
    for place in ("host tensor", "other device"):
        assert "same device" in found[place], found[place]
    assert (found["kernel"], found["item"], found["nonzero"], found["copy to host"]) == (0, 1, 1, 1)
    assert found["full"].startswith("OutOfMemoryError: CUDA out of memory"), found["full"]
