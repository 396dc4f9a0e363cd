"""``scripts/setup.sh`` installs the build of torch that driver and cards can use, or stops and says
why; on pretend machines.

A machine is a folder with a copy of the script and a ``PATH`` of its own: a pretend ``nvidia-smi``,
``pip``, ``python`` and ``torch``, and the few real programs that the script calls. What the script
asks of Python is computed by a real one, with a ``torch`` that runs kernels where NVIDIA's and
PyTorch's tables say so.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, Finished, run

pytestmark = pytest.mark.process

CUDA_12 = "https://download.pytorch.org/whl/cu126"
CPU = "https://download.pytorch.org/whl/cpu"
PYPI = "PyPI"
TOO_OLD = "stop"

CARDS = {"V100": "7.0", "T4": "7.5", "A100": "8.0", "H100": "9.0", "B200": "10.0"}
TABLE = {
    # driver:      V100     T4       A100     H100     B200
    "470.256.02": (TOO_OLD, TOO_OLD, TOO_OLD, TOO_OLD, TOO_OLD),
    "515.105.01": (TOO_OLD, TOO_OLD, TOO_OLD, TOO_OLD, TOO_OLD),
    "525.60.13": (CUDA_12, CUDA_12, CUDA_12, CUDA_12, TOO_OLD),
    "535.104.05": (CUDA_12, CUDA_12, CUDA_12, CUDA_12, TOO_OLD),
    "550.54.14": (CUDA_12, CUDA_12, CUDA_12, CUDA_12, TOO_OLD),
    "570.86.15": (CUDA_12, CUDA_12, CUDA_12, CUDA_12, TOO_OLD),
    "575.57.08": (CUDA_12, CUDA_12, CUDA_12, CUDA_12, TOO_OLD),
    "580.65.06": (CUDA_12, PYPI, PYPI, PYPI, PYPI),
    "590.44.01": (CUDA_12, PYPI, PYPI, PYPI, PYPI),
}
CELLS = [(driver, card, row[i]) for driver, row in TABLE.items() for i, card in enumerate(CARDS)]

PROGRAMS = "bash sh cat cp mkdir rm sed grep sort paste sha256sum cut dirname basename tr"
NOT_LOADED = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    "Make sure that the latest NVIDIA driver is installed and running."
)

NVIDIA_SMI = """#!/bin/sh
echo "nvidia-smi $*" >>"$MACHINE/log"
if [ -e "$MACHINE/smi-fails" ]; then . "$MACHINE/smi-fails"; fi
case "$*" in
-L) cat "$MACHINE/listing" ;;
"--query-gpu=driver_version --format=csv,noheader") sed "s/.*/$(cat "$MACHINE/driver")/" "$MACHINE/cards" ;;
"--query-gpu=compute_cap --format=csv,noheader")
    case "$(cat "$MACHINE/driver")" in 470.*)
        echo 'Field "compute_cap" is not a valid field to query.'
        exit 2 ;;
    esac
    cat "$MACHINE/cards" ;;
*) exit 2 ;;
esac
"""  # noqa: E501

PIP = f"""#!/bin/sh
echo "pip $*" >>"$MACHINE/log"
case "$*" in
*torch==2.13.0+cpu*) exit 1 ;; # PyPI has none
*torch==2.13.0*"--index-url {CUDA_12}") new="2.13.0+cu126 12.6" ;;
*torch==2.13.0*"--index-url {CPU}") new="2.13.0+cpu None" ;;
*torch==2.13.0) new="2.13.0+cu130 13.0" ;;
*torch==*) exit 1 ;;
*) exit 0 ;;
esac
case "$*" in *--index-url*) if [ -e "$MACHINE/offline" ]; then exit 1; fi ;; esac
case "$(cat "$MACHINE/torch" 2>/dev/null) $*" in *--force-reinstall*) ;; 2.13.0*) exit 0 ;; esac # the requirement is satisfied
echo "$new" >"$MACHINE/torch"
"""  # noqa: E501

VENV_PYTHON = f"""#!/bin/sh
case "$*" in
*version_info*) cat "$MACHINE/venv-version" ;;
"-m llmtune.launch.preflight.deepspeed_ops") echo "ops" >>"$MACHINE/log" ;;
*) PYTHONPATH=$MACHINE/site exec {sys.executable} -S "$@" ;;
esac
"""

PYTHON = """#!/bin/sh
case "$*" in
*version_info*) echo VERSION ;;
--version) echo Python VERSION.0 ;;
"-m venv .venv")
    echo "venv by VERSION" >>"$MACHINE/log"
    mkdir -p .venv/bin
    cp "$MACHINE/venv/pip" "$MACHINE/venv/python" .venv/bin
    echo VERSION >"$MACHINE/venv-version" ;;
esac
"""

TORCH = """
import os
from pathlib import Path

machine = Path(os.environ["MACHINE"])
if not (machine / "torch").exists():
    raise ModuleNotFoundError("No module named 'torch'")
__version__, _cuda = (machine / "torch").read_text().split()
_driver = int((machine / "driver").read_text().split(".")[0]) if (machine / "driver").exists() else 0
_cards = [float(line) for line in (machine / "cards").read_text().split()] if _driver else []
_least = {"12.6": 525, "13.0": 580}.get(_cuda, 0)


class version:
    cuda = None if _cuda == "None" else _cuda


class cuda:
    @staticmethod
    def device_count():
        return len(_cards) if _cuda != "None" and _driver >= _least else 0


class _Tensor:
    def add_(self, number):
        return self

    def item(self):
        return 2.0


def ones(count, device):
    index = int(device.partition(":")[2])
    if _cuda == "None":
        raise AssertionError("Torch not compiled with CUDA enabled")
    if _driver < _least:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update it.")
    if (machine / "no-fabric").exists():
        raise RuntimeError("Error 802: system not yet initialized")
    low, high = {"12.6": (5.0, 9.0), "13.0": (7.5, 12.1)}[_cuda]
    if not low <= _cards[index] <= high:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\\nSearch for it")
    with (machine / "log").open("a") as log:
        print("kernel on", device, file=log)
    return _Tensor()
"""  # noqa: E501


class Machine:
    """A pretend machine with a clone of the project, without a GPU."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.project = folder, folder / "bin", folder / "project"
        self.state = {
            name: folder / name
            for name in ("log", "torch", "driver", "cards", "offline", "no-fabric")
        }
        for name in ("bin", "venv", "site", "project/scripts", "project/.venv/bin"):
            (folder / name).mkdir(parents=True)
        for name in PROGRAMS.split():
            (self.bin / name).symlink_to(str(shutil.which(name)))
        self.program("g++", "#!/bin/sh\ncat >/dev/null\n")
        self.program("id", "#!/bin/sh\necho 1000\n")
        self.python("python3.11", "3.11")
        for name, text in (("pip", PIP), ("python", VENV_PYTHON)):
            self.program(f"../venv/{name}", text)
            shutil.copy(folder / "venv" / name, self.project / ".venv/bin")
        (folder / "venv-version").write_text("3.11\n")
        (folder / "site/torch.py").write_text(TORCH)
        shutil.copy(ROOT / "scripts/setup.sh", self.project / "scripts")
        texts = {
            "setup.py": "s\n",
            "setup.cfg": "c\n",
            "pyproject.toml": "p\n",
            "constraints.txt": "torch==2.13.0\n",
        }
        for name, text in {**texts, "requirements-dev.lock": "l\n"}.items():
            (self.project / name).write_text(text)

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def python(self, name: str, version: str) -> None:
        self.program(name, PYTHON.replace("VERSION", version))

    def gpus(self, driver: str, *capabilities: str) -> None:
        """Give it these GPUs, in the place of those that it had."""
        self.program("nvidia-smi", NVIDIA_SMI)
        (self.folder / "driver").write_text(f"{driver}\n")
        (self.folder / "cards").write_text("".join(f"{one}\n" for one in capabilities))
        (self.folder / "listing").write_text(
            "".join(f"GPU {i}: NVIDIA\n" for i in range(len(capabilities)))
        )

    def set_up(self, **variables: str) -> Finished:
        """Run the script, with a log of its own."""
        self.state["log"].write_text("")
        env = {
            "PATH": str(self.bin),
            "MACHINE": str(self.folder),
            "PYTHON": "",
            "LLMTUNE_TORCH": "",
            **variables,
        }
        return run([str(self.bin / "bash"), "scripts/setup.sh"], self.project, env, timeout=60)

    @property
    def log(self) -> list[str]:
        return self.state["log"].read_text().splitlines()

    @property
    def torch(self) -> str:
        """The installed build."""
        return self.state["torch"].read_text().strip() if self.state["torch"].exists() else ""

    @property
    def torch_from(self) -> list[str]:
        """Where pip was told to take torch from, each time that it did."""
        lines = [line for line in self.log if "torch==" in line and "+cpu" not in line]
        return [line.partition("--index-url ")[2] or PYPI for line in lines]

    @property
    def is_set_up(self) -> bool:
        return (self.project / ".venv/llmtune-setup").exists()

    def refused(self, done: Finished, *said: str) -> None:
        """It stopped with one message that has all this, and neither went on nor counts as set
        up.
        """
        assert done.code == 7, (done.out, done.err)
        assert done.err.startswith("error: "), done.err
        assert done.err.count("\n") == 1, done.err
        for words in said:
            assert words in done.err
        assert "run" in done.err
        assert not self.is_set_up
        assert not any("-e ." in line or line == "ops" for line in self.log), self.log


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("driver", "card", "expected"), CELLS, ids=[f"{d}-{c}" for d, c, _ in CELLS]
)
def test_driver_and_card_choose_the_build(
    machine: Machine, driver: str, card: str, expected: str
) -> None:
    count = 1 + CELLS.index((driver, card, expected)) % 8
    machine.gpus(driver, *[CARDS[card]] * count)
    done = machine.set_up()
    if expected == TOO_OLD:
        least = "580" if card == "B200" and int(driver[:3]) >= 525 else "525"
        machine.refused(
            done, f"driver {driver} is too old", f"driver {least} or newer", "Update the driver"
        )
        assert machine.torch_from == []
        return
    assert done.code == 0, (done.out, done.err)
    assert machine.torch_from == [expected]
    assert driver in done.out
    # On every GPU, and before the rest is installed.
    kernels = [line for line in machine.log if line.startswith("kernel")]
    assert kernels == [f"kernel on cuda:{i}" for i in range(count)]
    assert [line for line in machine.log if not line.startswith("nvidia-smi")][-4:] == [
        kernels[-1],
        "pip install -q --no-deps --require-hashes -r requirements-dev.lock",
        "pip install -q --no-deps -e .",
        "ops",
    ]
    assert machine.is_set_up
    again = machine.set_up()
    assert again.out == "== .venv is up to date\n", (again.out, again.err)
    assert not any(line.startswith(("pip", "kernel")) for line in machine.log)


@pytest.mark.parametrize(
    ("driver", "cards", "expected"),
    [
        ("580.65.06", ("8.0", "7.0"), CUDA_12),
        ("580.65.06", ("10.0", "8.9"), PYPI),
        ("560.35.03", ("9.0", "8.6"), CUDA_12),
    ],
)
def test_cards_of_several_kinds(
    machine: Machine, driver: str, cards: tuple[str, ...], expected: str
) -> None:
    machine.gpus(driver, *cards)
    assert machine.set_up().code == 0
    assert machine.torch_from == [expected]


def test_no_build_serves_volta_and_blackwell_at_once(machine: Machine) -> None:
    machine.gpus("580.65.06", "10.0", "7.0")
    machine.refused(machine.set_up(), "driver 580.65.06", "capability 7.0", "those of 10.0")
    assert machine.torch_from == []


def test_mig_is_the_same_card(machine: Machine) -> None:
    machine.gpus("580.65.06", CARDS["H100"], CARDS["H100"])
    slices = (
        "GPU 0: NVIDIA H100\n  MIG 3g.40gb Device 0: (UUID: MIG-1)\n  MIG 3g.40gb Device 1: (UUID:"
        " MIG-2)\n"
    )
    (machine.folder / "listing").write_text(slices)
    assert machine.set_up().code == 0
    assert machine.torch_from == [PYPI]


def test_a_driver_whose_cards_are_not_told_goes_by_its_version(machine: Machine) -> None:
    machine.gpus("580.65.06", "[N/A]")
    machine.state["no-fabric"].touch()
    machine.refused(machine.set_up(), "driver 580.65.06")
    assert machine.torch_from == [PYPI]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (9, NOT_LOADED),
        (18, "Failed to initialize NVML: Driver/library version mismatch"),
        (6, "No devices were found"),
        (0, ""),
    ],
)
def test_a_driver_that_does_not_answer_is_not_the_absence_of_a_gpu(
    machine: Machine, code: int, says: str
) -> None:
    machine.gpus("580.65.06", CARDS["A100"])
    (machine.folder / "smi-fails").write_text(f'echo "{says}"\nexit {code}\n')
    machine.refused(
        machine.set_up(), says, f"exit code {code}", "Load the driver", "LLMTUNE_TORCH=cpu"
    )
    assert not any(line.startswith("pip") for line in machine.log)
    done = machine.set_up(LLMTUNE_TORCH="cpu")
    assert done.code == 0, done.err
    assert machine.torch == "2.13.0+cpu None"
    assert not any(line.startswith("nvidia-smi") for line in machine.log)


def test_a_warning_beside_the_version_does_no_harm(machine: Machine) -> None:
    machine.gpus("580.65.06", CARDS["A100"])
    warning = "WARNING: infoROM is corrupted at gpu 0000:00:04.0"
    machine.program(
        "nvidia-smi", NVIDIA_SMI.replace("esac\n", f'esac\necho "{warning}"\nexit 14\n')
    )
    assert machine.set_up().code == 0
    assert machine.torch_from == [PYPI]


def test_a_build_that_runs_no_kernel_stops_the_set_up(machine: Machine) -> None:
    machine.gpus("580.65.06", *[CARDS["H100"]] * 8)
    machine.state["no-fabric"].touch()
    said = (
        "driver 580.65.06",
        "torch 2.13.0+cu130",
        "for CUDA 13.0",
        "Error 802: system not yet initialized",
    )
    done = machine.set_up()
    machine.refused(done, *said, "nvidia-fabricmanager", "LLMTUNE_TORCH=cpu")
    assert "CUDA_VISIBLE_DEVICES" not in done.err
    machine.refused(machine.set_up(CUDA_VISIBLE_DEVICES="7"), *said, "CUDA_VISIBLE_DEVICES is '7'")
    machine.state["no-fabric"].unlink()
    # It runs now, so that nothing has to be installed.
    assert machine.set_up().code == 0
    assert machine.torch_from == []
    assert "kernel on cuda:7" in machine.log


def test_one_card_of_several_without_kernels_stops_the_set_up(machine: Machine) -> None:
    # The question for the cards is not answered, so that the driver alone decides.
    machine.gpus("580.65.06", CARDS["A100"], CARDS["V100"])
    machine.program("nvidia-smi", NVIDIA_SMI.replace("470.*)", "*)"))
    done = machine.set_up()
    machine.refused(done, "driver 580.65.06", "capability unknown", "no kernel image is available")
    assert "Search for it" not in done.err


def test_a_torch_that_ends_python_stops_the_set_up(machine: Machine) -> None:
    machine.gpus("550.54.14", CARDS["A100"])
    (machine.folder / "site/torch.py").write_text("import os\nos.abort()\n")
    machine.refused(machine.set_up(), "driver 550.54.14", "exit code 134")


def test_an_index_that_cannot_be_reached_stops_the_set_up(machine: Machine) -> None:
    machine.gpus("535.104.05", CARDS["A100"])
    machine.state["offline"].touch()
    machine.refused(machine.set_up(), "driver 535.104.05", CUDA_12, "LLMTUNE_TORCH=cpu")


def test_an_older_driver_is_noticed(machine: Machine) -> None:
    machine.gpus("580.65.06", CARDS["A100"])
    assert machine.set_up().code == 0
    machine.gpus("550.54.14", CARDS["A100"])
    done = machine.set_up()
    assert "up to date" not in done.out
    assert (done.code, machine.torch_from, machine.torch) == (0, [CUDA_12], "2.13.0+cu126 12.6")
    machine.gpus("470.256.02", CARDS["A100"])
    machine.refused(machine.set_up(), "driver 470.256.02", "525")


def test_another_card_is_noticed_and_one_more_of_a_kind_is_not(machine: Machine) -> None:
    machine.gpus("580.65.06", CARDS["A100"])
    assert machine.set_up().code == 0
    machine.gpus("580.65.06", CARDS["A100"], CARDS["A100"])
    assert "up to date" in machine.set_up().out
    machine.gpus("580.65.06", CARDS["V100"])
    assert (machine.set_up().code, machine.torch_from) == (0, [CUDA_12])


def test_a_build_that_works_stays_when_the_driver_gets_newer(machine: Machine) -> None:
    machine.gpus("550.54.14", CARDS["A100"])
    assert machine.set_up().code == 0
    machine.gpus("580.65.06", CARDS["A100"])
    done = machine.set_up()
    assert "up to date" not in done.out
    assert (done.code, machine.torch_from, machine.torch) == (0, [], "2.13.0+cu126 12.6")
    assert "kernel on cuda:0" in machine.log


@pytest.mark.parametrize("driver", ["550.54.14", "580.65.06"])
def test_the_cpu_build_gives_way_to_a_gpu(machine: Machine, driver: str) -> None:
    assert machine.set_up().code == 0
    assert machine.torch == "2.13.0+cpu None"
    machine.gpus(driver, CARDS["T4"])
    assert machine.set_up().code == 0
    assert machine.torch == (
        "2.13.0+cu130 13.0" if driver.startswith("58") else "2.13.0+cu126 12.6"
    )


def test_the_cpu_build_on_purpose_and_back(machine: Machine) -> None:
    machine.gpus("580.65.06", CARDS["A100"])
    assert machine.set_up().code == 0
    done = machine.set_up(LLMTUNE_TORCH="cpu")
    assert (done.code, machine.torch_from, machine.torch) == (0, [CPU], "2.13.0+cpu None")
    assert "LLMTUNE_TORCH=cpu" in done.out
    assert "up to date" in machine.set_up(LLMTUNE_TORCH="cpu").out
    assert machine.set_up().code == 0
    assert machine.torch == "2.13.0+cu130 13.0"


def test_the_cpu_build_on_purpose_where_there_is_no_gpu(machine: Machine) -> None:
    machine.state["torch"].write_text("2.13.0+cu130 13.0")
    assert machine.set_up().code == 0
    assert (machine.set_up(LLMTUNE_TORCH="cpu").code, machine.torch) == (0, "2.13.0+cpu None")


def test_the_variable_takes_one_word(machine: Machine) -> None:
    machine.refused(machine.set_up(LLMTUNE_TORCH="cu118"), "LLMTUNE_TORCH is 'cu118'")


def test_a_set_up_that_was_cut_short_counts_for_no_driver(machine: Machine) -> None:
    machine.gpus("580.65.06", CARDS["A100"])
    assert machine.set_up().code == 0
    machine.program("../project/.venv/bin/pip", PIP.replace("*) exit 0 ;;", "*) exit 1 ;;"))
    assert machine.set_up(LLMTUNE_TORCH="cpu").code == 1
    machine.program("../project/.venv/bin/pip", PIP)
    done = machine.set_up()
    assert "up to date" not in done.out
    assert (done.code, machine.torch) == (0, "2.13.0+cu130 13.0")


@pytest.mark.parametrize(
    ("installed", "expected"), [("", "2.13.0+cpu None"), ("2.13.0+cu130 13.0", "2.13.0+cu130 13.0")]
)
def test_without_a_gpu_nothing_is_different(
    machine: Machine, installed: str, expected: str
) -> None:
    if installed:
        machine.state["torch"].write_text(installed)
    done = machine.set_up()
    assert done.code == 0, done.err
    assert (machine.torch_from, machine.torch) == ([] if installed else [CPU], expected)
    assert not any(line.startswith("kernel") for line in machine.log)
    files = (
        "setup.py",
        "setup.cfg",
        "pyproject.toml",
        "constraints.txt",
        "requirements-dev.lock",
        "scripts/setup.sh",
    )
    content = b"".join((machine.project / name).read_bytes() for name in files)
    assert (
        machine.project / ".venv/llmtune-setup"
    ).read_text() == f"{hashlib.sha256(content).hexdigest()}\n"
    assert machine.set_up().out == "== .venv is up to date\n"


@pytest.mark.parametrize(
    ("pythons", "given", "expected"),
    [
        ({"python3": "3.11"}, "", "3.11"),
        ({"python3": "3.12"}, "", "3.12"),
        ({"python3.13": "3.13", "python3": "3.14"}, "", "3.13"),
        ({"python3.11": "3.11", "mine": "3.12"}, "mine", "3.12"),
        ({"python3": "3.14"}, "", "python3 is Python 3.14"),
        ({"python3": "3.15"}, "", "python3 is Python 3.15"),
        ({"python3": "3.10"}, "", "python3 is Python 3.10"),
        ({"python3.11": "3.11", "mine": "3.14"}, "mine", "mine is Python 3.14"),
        ({}, "", "sudo apt-get install python3"),
    ],
)
def test_python_is_one_that_is_supported(
    machine: Machine, pythons: dict[str, str], given: str, expected: str
) -> None:
    shutil.rmtree(machine.project / ".venv")
    (machine.bin / "python3.11").unlink()
    for name, version in pythons.items():
        machine.python(name, version)
    done = machine.set_up(PYTHON=given)
    if re.fullmatch(r"3\.\d+", expected):
        assert done.code == 0, done.err
        assert f"venv by {expected}" in machine.log
        return
    machine.refused(done, expected)
    assert not (machine.project / ".venv").exists()


def test_an_environment_of_another_python_is_refused(machine: Machine) -> None:
    (machine.folder / "venv-version").write_text("3.14\n")
    machine.refused(machine.set_up(), "Python of .venv is 3.14", "delete .venv")


def test_an_environment_that_is_there_needs_no_other_python(machine: Machine) -> None:
    # It was made with PYTHON=, which the next run does not have to name again.
    (machine.bin / "python3.11").unlink()
    machine.python("python3", "3.14")
    assert machine.set_up().code == 0
