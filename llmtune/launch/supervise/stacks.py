"""Collect the stack traces of all threads from ranks that hang."""

import faulthandler
import os
import signal
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from llmtune.launch.processes.rank_process import RankProcess
from llmtune.storage.rank_files import read_phase, stack_file

_ANSWER_SECONDS = 2.0


def answer_with_stacks(folder: Path, rank: int) -> None:
    """Make this rank write its stacks on SIGUSR2.

    The handler runs in C, so that it also works while a thread is stuck in a library.
    """
    # Never closed: the handler needs it as long as the process lives.
    answer = os.open(stack_file(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    faulthandler.register(signal.SIGUSR2, file=answer, all_threads=True, chain=False)


def save_stacks(ranks: Sequence[RankProcess], folder: Path, run_folder: Path, why: str) -> str:
    """Ask all ranks for their stacks and write the answers to a file in ``run_folder``.

    Returns:
        A phrase for messages: where the file is, and which ranks did not answer.
    """
    for rank in ranks:
        # Before the file exists, the rank has no handler, and the signal would end it.
        if rank.exit_code() is None and stack_file(folder, rank.number).exists():
            rank.send(signal.SIGUSR2)
    time.sleep(_ANSWER_SECONDS)

    # Collect the answers, each with the phase of its rank.
    parts, silent = [why], []
    for rank in ranks:
        record = read_phase(folder, rank.number)
        stack = _read(stack_file(folder, rank.number))
        if rank.exit_code() is not None:
            stack = f"ended with exit code {rank.exit_code()}\n"
        elif not stack:
            silent.append(str(rank.number))
            stack = "no answer\n"
        parts.append(
            f"==== rank {rank.number}: {record.phase}, step {record.step}, pid {rank.pid}\n{stack}"
        )
    missing = f"no answer from rank {', '.join(silent)}" if silent else ""
    file = run_folder / f"stacks-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.txt"
    try:
        file.write_text("\n\n".join([*parts, missing]).rstrip() + "\n")
    except OSError as error:
        return f"their stacks could not be saved ({error.strerror})"
    return f"their stacks are in {file}" + (f", {missing}" if missing else "")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
