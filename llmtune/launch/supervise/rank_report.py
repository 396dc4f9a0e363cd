"""Send a rank's output to the log, limit its memory, and report its error."""

import contextlib
import errno
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from llmtune.errors import (
    EXIT_UNEXPECTED,
    ConfigError,
    DoesNotFitError,
    LlmtuneError,
    MissingPrerequisiteError,
    RollbackError,
)
from llmtune.launch.launchers.environment import FAILURE_DIR
from llmtune.launch.processes.log_filter import start_filter
from llmtune.launch.supervise.out_of_memory import memory_pool
from llmtune.registry import describe_plugin_error
from llmtune.security.redaction import has_secrets, redact
from llmtune.security.terminal import to_terminal
from llmtune.storage.rank_files import FailureReport


def redirect_output(log: Path) -> IO[str]:
    """Send everything that this process and its libraries print to ``log``, without secrets.

    Returns:
        The old stdout, through which nothing is filtered.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    console = os.fdopen(os.dup(1), "w", buffering=1)
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    descriptor = start_filter(log) if has_secrets() else os.open(log, append, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    return console


#: A full disk or quota, and a file system that has become read-only.
_DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextlib.contextmanager
def hold_output(file: Path) -> Iterator[None]:
    """In the block, write what this process and its libraries print to ``file``.

    There is no log yet, and the console is the supervisor's.
    """
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    target = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(target, descriptor)
    os.close(target)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, old in zip((1, 2), kept, strict=True):
            os.dup2(old, descriptor)
            os.close(old)


def to_user_error(error: BaseException) -> LlmtuneError | None:
    """Turn an error into one with advice; return None for an error without advice.

    There is advice for our own errors, memory that ran out, a full disk, and a plug-in that fails.
    """
    if isinstance(error, LlmtuneError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK_REFUSES:
        where = f" ({redact(str(error.filename))})" if error.filename else ""
        return MissingPrerequisiteError(
            f"{error.strerror}{where}: free space, or name another place (output_dir=,"
            " paths.cache_dir=, TMPDIR). Then run the same command again"
        )
    # Before it is cut: half a secret is not recognized.
    text = redact(str(error))
    if memory_pool(error) is not None:
        first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        return DoesNotFitError(
            f"out of memory: {first[:300]}\nTry: train.per_device_train_batch_size=1"
            " train.gradient_checkpointing=true; zero=3 on several ranks; offload=optimizer_cpu or"
            " offload=cpu; a smaller data.max_seq_length. The same command then resumes from the"
            " newest checkpoint."
        )
    if (problem := describe_plugin_error(error)) is not None:
        return ConfigError(redact(problem))
    return None


def limit_memory(limit_bytes: int, accelerator: str, local_rank: int) -> None:
    """Cap this rank: its share of the GPU, or what a CPU rank may allocate (``RLIMIT_DATA``)."""
    if accelerator == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
        return
    import torch

    device = torch.accelerator.current_accelerator()
    assert device is not None
    module = torch.get_device_module(device)
    total = module.get_device_properties(local_rank).total_memory
    module.set_per_process_memory_fraction(min(1.0, limit_bytes / total), local_rank)


def report_failure(error: BaseException, rank: int, console: IO[str], trace: bool) -> int:
    """Write the traceback to the log, and the message to the supervisor, or else to the console.

    Returns:
        The exit code.
    """
    story = redact("".join(traceback.format_exception(error)))
    # The log may be on the disk that is full.
    with contextlib.suppress(OSError):
        sys.stderr.write(story)
        sys.stderr.flush()
    known = to_user_error(error)
    message = redact(str(known) if known else f"{type(error).__name__}: {error}")
    if trace:
        message = story.rstrip()
    code = known.exit_code if known else EXIT_UNEXPECTED

    # llmtune's supervisor reads a report; without one, the user reads the console.
    folder = os.environ.get(FAILURE_DIR)
    if folder:
        FailureReport(
            rank=rank,
            code=code,
            message=message,
            known=known is not None,
            time=time.time(),
            out_of_memory=memory_pool(error),
            rollback=isinstance(error, RollbackError),
        ).write(Path(folder))
    elif known is not None or rank == 0:
        console.write(to_terminal(f"\nerror (rank {rank}): {message}\n"))
        console.flush()
    return code
