"""Processes of tests that start warm: forked from one that has imported torch, transformers,
DeepSpeed and peft already.

``python -m llmtune`` spends most of its first seconds on imports, and a run on two ranks does so
three times. :func:`install` puts :class:`Popen` in the place of ``subprocess.Popen``: what starts
``[sys.executable, "-m" or "-c", ...]`` gets a process from a *nursery*, a child of the starting
process that imported the libraries (none of llmtune's modules) and does nothing but fork. The new
process is a child of the one that started it, has its own arguments, environment, folder, files,
session and signals, and has a nursery of its own, so that the ranks of a supervisor start warm too.

What a fork cannot give is started for real: another interpreter or program, and an environment that
differs in variables which are read once, on import or by the loader (``_READ_ONCE``). ``cold()``
starts everything for real; the tests of the start itself use it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent

#: Imported by every nursery; what one command or another of llmtune loads.
LIBRARIES = (
    "hydra",
    "omegaconf",
    "rich.console",
    "dotenv",
    "psutil",
    "xxhash",
    "fsspec.implementations.local",
    "torch",
    "torch.distributed",
    "torch.distributed._tools.mem_tracker",
    "torch._subclasses.fake_tensor",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.integrations.deepspeed",
    "tokenizers",
    "deepspeed",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.ops.adam",
    "peft",
    "safetensors.torch",
    "huggingface_hub",
    "datasets",
    "pyarrow.parquet",
    "matplotlib.pyplot",
)

#: Variables that libraries read when they are imported, or the loader when a process begins.
_READ_ONCE = (
    "LD_",
    "PYTHON",
    "LC_",
    "LANG",
    "HF_",
    "TRANSFORMERS_OFFLINE",
    "TRANSFORMERS_CACHE",
    "PYTORCH_",
    *("CUDA_", "DS_ACCELERATOR", "MPL"),
)
_READ_LATER = ("PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "HF_TOKEN")

#: Processes of one test can be told by the value of this variable; ``/proc/PID/environ`` of a fork
#: is its parent's.
MARK = "LLMTUNE_FAULT_ID"
_COLD = "LLMTUNE_TEST_START"

_READY = b"ready"
_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LIBC = ctypes.CDLL(None)
_RealPopen = subprocess.Popen


def comm_of(mark: str) -> str:
    """The name that ``/proc/PID/comm`` gives of a warm process with this mark."""
    return mark[:15]


@contextlib.contextmanager
def cold() -> Iterator[None]:
    """In the block, processes and all that they start themselves start for real."""
    before = os.environ.get(_COLD)
    os.environ[_COLD] = "cold"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_COLD]
        else:
            os.environ[_COLD] = before


class Nursery:
    """The child that forks, seen from the process that it belongs to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channel: socket.socket | None = None
        self._fixed: dict[str, str] = {}

    def start(self) -> None:
        """For real, which takes as long as the imports do; once a test session."""
        own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        for name in ("OMP_NUM_THREADS", "RANK", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED"):
            environment.pop(name, None)
        _RealPopen(
            [sys.executable, "-m", "tests.processes", str(other.fileno())],
            cwd=ROOT,
            env=environment,
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        other.close()
        if own.recv(64) != _READY:
            raise ChildProcessError("the nursery ended while it imported the libraries")
        self._channel, self._fixed = own, _fixed(environment)

    def adopt(self, channel: socket.socket, environment: dict[str, str]) -> None:
        """One that was forked before this process did anything."""
        self._channel, self._fixed = channel, _fixed(environment)

    def can_start(self, arguments: Any, environment: dict[str, str]) -> bool:
        """Whether a fork does for this command."""
        return (
            self._channel is not None
            and isinstance(arguments, list)
            and len(arguments) > 2
            and arguments[0] == sys.executable
            and arguments[1] in ("-m", "-c")
            and arguments[2] not in ("pip", "zipfile")
            and _COLD not in environment
            and _fixed(environment) == _fixed(self._fixed, _reads_later(environment))
        )

    def fork(self, request: dict[str, Any], files: list[int]) -> int:
        """A new child of this process; its id.

        Args:
            files: Its standard input, output and error, and what else it is to have under the same
                numbers.
        """
        assert self._channel is not None
        with self._lock:
            # The new process is forked twice, and a process whose parent has ended goes to the
            # nearest of these.
            _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)
            try:
                place = _memory_file(json.dumps(request).encode())
                socket.send_fds(self._channel, [b"x"], [place, *files])
                os.close(place)
                answer = self._channel.recv(64)
            finally:
                _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 0)
        if not answer:
            raise ChildProcessError("the nursery has ended")
        return int(answer)


NURSERY = Nursery()


class Popen(subprocess.Popen):  # type: ignore[type-arg]
    """``subprocess.Popen`` that forks what can be forked."""

    def _execute_child(self, *given: Any) -> None:
        names = list(inspect.signature(_RealPopen._execute_child).parameters)[1:]  # type: ignore[attr-defined]
        a = dict(zip(names, given, strict=True))
        environment = dict(os.environ if a["env"] is None else a["env"])
        plain = not (a["shell"] or a["preexec_fn"] or a["executable"] or a["umask"] >= 0)
        if not (plain and NURSERY.can_start(a["args"], environment)):
            super()._execute_child(*given)  # type: ignore[misc]
            return
        sys.audit("subprocess.Popen", a["args"][0], a["args"], a["cwd"], a["env"])
        request = {
            "arguments": [os.fsdecode(argument) for argument in a["args"]],
            "environment": environment,
            "folder": os.fspath(a["cwd"] or Path.cwd()),
            "umask": _umask(),
            "session": a["start_new_session"],
            "group": a["process_group"],
            "parent": os.getpid(),
            "ignored": [n for n in signal.valid_signals() if signal.getsignal(n) == signal.SIG_IGN],
            "kept": [int(number) for number in a["pass_fds"]],
        }
        standard = [a["p2cread"], a["c2pwrite"], a["errwrite"]]
        standard = [number if number != -1 else own for own, number in enumerate(standard)]
        self.pid = NURSERY.fork(request, [*standard, *request["kept"]])
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(a[end] for end in ends))  # type: ignore[attr-defined]


def install() -> None:
    """From now on, processes of this one and its warm descendants start warm."""
    subprocess.Popen = Popen  # type: ignore[misc]


def main(channel: socket.socket) -> None:
    """The nursery: import, then fork on request until the owner has ended."""
    for name in LIBRARIES:
        importlib.import_module(name)
    import torch

    threads = torch.get_num_threads()
    # What is imported is neither looked through nor written to by the collector of any fork.
    gc.collect()
    gc.freeze()
    channel.send(_READY)
    _serve(channel, threads)


def _serve(channel: socket.socket, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message, files, _, _ = socket.recv_fds(channel, 1, 64)
        if not message:
            os._exit(0)
        with os.fdopen(os.dup(files[0]), "rb") as place:
            place.seek(0)
            request = json.loads(place.read())
        os.close(files[0])
        read, write = os.pipe()
        between = os.fork()
        if between == 0:
            if os.fork():
                os._exit(0)
            # Before its parent knows of it, which may kill the whole group at once.
            if request["session"]:
                os.setsid()
            elif request["group"] >= 0:
                os.setpgid(0, request["group"])
            os.write(write, str(os.getpid()).encode())
            os.close(read)
            os.close(write)
            channel.close()
            _live(request, files[1:], threads)
        os.close(write)
        os.waitpid(between, 0)
        answer = os.read(read, 64)
        os.close(read)
        for number in files[1:]:
            os.close(number)
        channel.send(answer)


def _live(request: dict[str, Any], files: list[int], threads: int) -> NoReturn:
    """The life of a warm process, from its birth on."""
    while os.getppid() != request["parent"]:
        time.sleep(0.0005)
    os.environ.clear()
    os.environ.update(request["environment"])
    is_rank = "RANK" in os.environ
    if not is_rank:
        _found_nursery(threads, files)
    os.umask(request["umask"])
    os.chdir(request["folder"])
    _take_files(files, [0, 1, 2, *request["kept"]])
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(
                number, signal.SIG_IGN if number in request["ignored"] else signal.SIG_DFL
            )
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if mark := os.environ.get(MARK):
        _LIBC.prctl(_PR_SET_NAME, comm_of(mark).encode(), 0, 0, 0)
    _set_threads(threads)
    _set_malloc()
    code = _run(request["arguments"])
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _found_nursery(threads: int, files: list[int]) -> None:
    """Fork one for this process while it is still as good as new."""
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        own.close()
        for number in files:
            os.close(number)
        os.setsid()
        _serve(other, threads)
    other.close()
    NURSERY.adopt(own, dict(os.environ))
    install()


def _take_files(files: list[int], numbers: list[int]) -> None:
    """Give the received files their numbers."""
    # First out of the way of each other.
    away = [os.dup(number) for number in files]
    high = [_dup_above(number, max(numbers) + 1) for number in away]
    for number in {*files, *away}:
        if number not in high:
            os.close(number)
    for number, wanted in zip(high, numbers, strict=True):
        os.dup2(number, wanted)
        os.close(number)


def _dup_above(number: int, least: int) -> int:
    return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, least)


def _set_threads(default: int) -> None:
    """As torch does on import; ``OMP_NUM_THREADS`` may be a list, of which the first counts."""
    import torch

    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    wanted = int(given) if given.isdigit() and int(given) else default
    if wanted != torch.get_num_threads():
        torch.set_num_threads(wanted)


def _set_malloc() -> None:
    """What glibc reads from the environment when a process begins."""
    for name, option in (
        ("MALLOC_MMAP_THRESHOLD_", _M_MMAP_THRESHOLD),
        ("MALLOC_TRIM_THRESHOLD_", _M_TRIM_THRESHOLD),
    ):
        if given := os.environ.get(name):
            _LIBC.mallopt(option, int(given))


def _run(arguments: list[str]) -> int:
    """What ``python ARGUMENTS`` does; the exit code, or minus the number of the signal that is to
    end this process.
    """
    _, kind, what, *rest = arguments
    sys.orig_argv[:] = arguments
    sys.argv[:] = ["-c" if kind == "-c" else "-m", *rest]
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through=unbuffered or stream is sys.stderr)  # type: ignore[union-attr]
    path = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    first = [] if os.environ.get("PYTHONSAFEPATH") else ["" if kind == "-c" else str(Path.cwd())]
    sys.path[:] = [*first, *path, *_SYS_PATH]
    importlib.invalidate_caches()
    try:
        for folder in path:
            if (Path(folder) / "sitecustomize.py").is_file():
                sys.modules.pop("sitecustomize", None)
                importlib.import_module("sitecustomize")
                break
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            main_module = ModuleType("__main__")
            main_module.__builtins__ = __builtins__  # type: ignore[attr-defined]
            sys.modules["__main__"] = main_module
            exec(compile(what, "<string>", "exec"), main_module.__dict__)
    except SystemExit as end:
        if end.code is None:
            return 0
        if isinstance(end.code, int):
            return end.code & 0xFF
        sys.stderr.write(f"{end.code}\n")
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _fixed(environment: dict[str, str], later: Collection[str] | None = None) -> dict[str, str]:
    later = _reads_later(environment) if later is None else later
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_READ_ONCE) and name not in later
    }


def _reads_later(environment: dict[str, str]) -> Collection[str]:
    """Where GPUs are pretended (``tests/cuda/inside``), the accelerator is put in later, and
    nothing reads CUDA's settings.
    """
    return (
        *_READ_LATER,
        *(
            ("DS_ACCELERATOR", "PYTORCH_CUDA_ALLOC_CONF")
            if "PRETEND_DEVICES" in environment
            else ()
        ),
    )


def _memory_file(data: bytes) -> int:
    """Longer messages than a socket takes."""
    number = os.memfd_create("request")
    os.write(number, data)
    return number


def _umask() -> int:
    now = os.umask(0o022)
    os.umask(now)
    return now


_SYS_PATH: list[str] = []

if __name__ == "__main__":
    # The same module as the one that forks import by name.
    from tests import processes

    processes._SYS_PATH = [entry for entry in sys.path if entry not in ("", str(ROOT))]
    processes.main(socket.socket(fileno=int(sys.argv[1])))
