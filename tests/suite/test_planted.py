"""The ordinary suite fails for faults that are planted on purpose, one at a time, in a copy of the
source.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import ROOT


@dataclass(frozen=True, kw_only=True)
class Planted:
    """One change of one line, and tests of the ordinary suite that must not pass with it."""

    fault: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


PLANTED = [
    Planted(
        fault="the loss is divided by the micro-batches as well",
        file="engine/train_module.py",
        right="self.engine.optimizer)), scale_wrt_gas=False\n",
        wrong="self.engine.optimizer)), scale_wrt_gas=True\n",
        tests=(
            "tests/engine/test_parity.py::test_stages_ranks_and_accumulation_give_the_same_curve",
        ),
    ),
    Planted(
        fault="labels are shifted by two",
        file="task/targets.py",
        right="tokens.append(row.ids[1:][columns]",
        wrong="tokens.append(np.roll(row.ids, -1)[1:][columns]",
        tests=("tests/data/test_loader.py",),
    ),
    Planted(
        fault="the mask ends one token early",
        file="data/tokenize/fit_row.py",
        right="append((first, last + 1))",
        wrong="append((first, last))",
        tests=("tests/data/test_encode.py",),
    ),
    Planted(
        fault="a resumed AdamW counts its steps from 0",
        file="checkpoint/optimizer_files.py",
        right="make_state(module, batch, steps)",
        wrong="make_state(module, batch, 0)",
        tests=(
            "tests/checkpoint/test_resume_matrix.py::test_every_placement_goes_on_to_the_last_digit",
        ),
    ),
    Planted(
        fault="a rank takes its slice for that of another",
        file="engine/state_slices.py",
        right="start = rank * parameter.ds_tensor.ds_numel",
        wrong="start = (1 - rank) * parameter.ds_tensor.ds_numel",
        tests=(
            "tests/checkpoint/test_resume_matrix.py::test_every_placement_goes_on_to_the_last_digit",
        ),
    ),
    Planted(
        fault="hashes of the manifest are not compared",
        file="storage/manifest.py",
        right='if actual != entry["xxh3_128"]:',
        wrong='if actual == "":',
        tests=("tests/faults/test_damage.py", "tests/cli/test_verify.py"),
    ),
    Planted(
        fault="a merge without alpha / r",
        file="export/merge/deltas.py",
        right="delta = delta.mul_(self.scale)",
        wrong="delta = delta.mul_(1.0)",
        tests=("tests/export/test_merge.py",),
    ),
    Planted(
        fault="packed documents see each other",
        file="data/load/collate.py",
        right="torch.cat([torch.arange(length) for length in lengths])",
        wrong="torch.arange(sum(lengths))",
        tests=("tests/data/test_packing.py",),
    ),
    Planted(
        fault="the schedule is one step late",
        file="train/schedule.py",
        right="return (self.step - self.warmup_steps) /",
        wrong="return (self.step - 1 - self.warmup_steps) /",
        tests=("tests/train/test_schedule.py",),
    ),
    Planted(
        fault="the plan counts half the bytes of the optimizer",
        file="optimizer/optimizer.py",
        right="return self.master_bytes + self.state_bytes",
        wrong="return self.master_bytes",
        tests=("tests/engine/test_states.py",),
    ),
    Planted(
        fault="a rank does not hear a signal",
        file="train/stop_request.py",
        right="        self._signaled = True",
        wrong="        self._signaled = False",
        tests=("tests/faults/test_signals.py",),
    ),
    Planted(
        fault="a secret is printed as it is",
        file="security/redaction.py",
        right="(*match.span(), _label(known, match[0]))",
        wrong="(*match.span(), match[0])",
        tests=("tests/security/test_secrets.py",),
    ),
]


def test_every_fault_can_be_planted_and_names_tests_that_exist() -> None:
    for planted in PLANTED:
        assert (ROOT / "llmtune" / planted.file).read_text().count(planted.right) >= 1, (
            planted.fault
        )
        for test in planted.tests:
            file, _, name = test.partition("::")
            assert (
                f"def {name}" in (ROOT / file).read_text() if name else (ROOT / file).is_file()
            ), test


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The project, to be spoilt."""
    folder = tmp_path / "project"
    ignored = shutil.ignore_patterns(".venv", ".git", "runs", "outputs", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


def run_tests(folder: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """The named tests of the ordinary suite, on this copy of the source."""
    program = (
        # Only this process starts for real: its tests start theirs as the ordinary suite does.
        "import os; os.environ.pop('LLMTUNE_TEST_START', None); import sys; sys.path[:0] ="
        f" [{str(folder)!r}]; import llmtune; assert llmtune.__file__.startswith({str(folder)!r});"
        f" import pytest; sys.exit(pytest.main({['-x', '-q', '-p', 'no:cacheprovider', *tests]!r}))"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "LLMTUNE_TEST_CACHE": str(folder.parent / "cache"),
    }
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.usefixtures("started_cold")
@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.fault)
def test_a_planted_fault_is_caught(planted: Planted, copied: Path) -> None:
    file = copied / "llmtune" / planted.file
    text = file.read_text()
    assert text.count(planted.right) >= 1, "the line has changed: plant the fault anew"
    file.write_text(text.replace(planted.right, planted.wrong))
    done = run_tests(copied, planted.tests)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert "\nFAILED " in done.stdout, done.stdout[-3000:]


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.usefixtures("started_cold")
def test_nothing_planted_nothing_caught(copied: Path) -> None:
    """The same tests pass on the source as it is."""
    done = run_tests(
        copied, tuple(dict.fromkeys(test for planted in PLANTED for test in planted.tests))
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
