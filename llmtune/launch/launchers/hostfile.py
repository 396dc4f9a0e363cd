"""Run a command with ``launch.hostfile``: DeepSpeed's runner starts its ranks through ssh."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from llmtune.errors import ConfigError, MissingPrerequisiteError
from llmtune.security.redaction import describe_secret_overrides
from llmtune.security.trust import require_own

#: Prefixes of variables that DeepSpeed's runner passes on and ranks do not need; most are keys.
_PASSED_ON = ("MLFLOW",)

#: Variables that decide which libraries, modules and programs a process loads.
_EXECUTED = re.compile(r"(LD_|DYLD_|PYTHON).*|PATH|BASH_ENV|ENV|.*(PLUGIN|PRELOAD|INJECTION).*")

#: A host name or address: pdsh and ssh take what begins with a hyphen for an option, and interpret
#: other signs.
_HOST = re.compile(r"(?:[A-Za-z_][A-Za-z0-9._-]*@)?[A-Za-z0-9][A-Za-z0-9._-]*")
_LINE = re.compile(r"(\S+)\s+slots=([0-9]{1,4})\s*(?:#.*)?")


def read_hostfile(path: Path) -> dict[str, int]:
    """Read the ranks per host, as DeepSpeed does: one ``HOST slots=N`` per line, and comments.

    Raises:
        ConfigError: The file or one of its lines cannot be read; with the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise ConfigError(f"launch.hostfile={path}: {reason}") from error

    # Lines as ``_parse_hostfile`` of ``deepspeed/launcher/runner.py`` reads them.
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None or int(match[2]) == 0:
            raise ConfigError(
                f"{path}:{number}: {text!r} is not 'HOST slots=N' with N ranks of one GPU each"
            )
        if not _HOST.fullmatch(match[1]):
            raise ConfigError(
                f"{path}:{number}: {match[1]!r} is no name or address of a machine: letters,"
                " digits, '.', '-' and '_', of which a letter or a digit comes first, and perhaps"
                " USER@ before it; it would be given to ssh"
            )
        if match[1] in slots:
            raise ConfigError(
                f"{path}:{number}: {match[1]} is there twice; give all its slots in one line"
            )
        slots[match[1]] = int(match[2])
    if not slots:
        raise ConfigError(f"launch.hostfile={path}: no line 'HOST slots=N' in it")
    return slots


def exec_runner(path: Path, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by DeepSpeed's runner, with the same arguments for every rank.

    Raises:
        ConfigError: The host file is wrong, or a secret is among the arguments.
        MissingPrerequisiteError: A program that reaches the other machines is missing.
    """
    _check_arguments(arguments)
    command = runner_command(path, arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, runner_environment())


def runner_command(path: Path, arguments: Sequence[str]) -> list[str]:
    """Return the command line of DeepSpeed's runner in this environment.

    Raises:
        As :func:`exec_runner`.
    """
    # One machine needs neither pdsh nor ssh.
    several = len(read_hostfile(path)) > 1
    missing = [program for program in ("pdsh", "ssh") if several and shutil.which(program) is None]
    if missing:
        raise MissingPrerequisiteError(
            f"launch.hostfile={path} needs {' and '.join(missing)} here (apt-get install pdsh"
            " openssh-client), or start one command per machine: torchrun --nnodes ... --module"
            " llmtune ..."
        )
    # The local rank is in the environment too; as an argument it would come before the verb.
    runner = [
        "-m",
        "deepspeed.launcher.runner",
        "--hostfile",
        str(path),
        "--no_local_rank",
        "--module",
        "llmtune",
    ]
    return [sys.executable, *runner, *(map(quote_for_pdsh, arguments) if several else arguments)]


def runner_environment() -> dict[str, str]:
    """Return the environment of DeepSpeed's runner.

    The runner passes variables, and the lines of ``.deepspeed_env``, on as arguments of pdsh and
    ssh, which all users of every machine can see. Ranks take their keys from ``.env``, or from the
    environment of their machine.

    Raises:
        MissingPrerequisiteError: The working folder's ``.deepspeed_env`` is another user's, or
            decides what ranks execute: the folder may be someone else's.
    """
    listed = Path(os.environ.get("DS_ENV_FILE", ".deepspeed_env"))
    if listed.is_file():
        require_own(
            listed, "DeepSpeed's variables for all nodes", "start llmtune in another folder"
        )
    if not listed.is_absolute() and listed.is_file():
        names = (
            line.partition("=")[0].strip()
            for line in listed.read_text(errors="replace").splitlines()
        )
        if executed := sorted(filter(_EXECUTED.fullmatch, names)):
            raise MissingPrerequisiteError(
                f"{listed} in the working folder sets {', '.join(executed)}, which says what every"
                " node executes; move it to ~/.deepspeed_env"
            )
    return {name: value for name, value in os.environ.items() if not name.startswith(_PASSED_ON)}


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse secrets, which would be visible in the command lines of every machine.

    Raises:
        ConfigError: With the keys that hold one.
    """
    if shown := describe_secret_overrides(arguments):
        raise ConfigError(f"launch.hostfile: {shown.removeprefix('note: ')}")


def quote_for_pdsh(argument: str) -> str:
    """Quote an argument for DeepSpeed's runner so that the remote shell of pdsh reads it unchanged.

    The runner only puts double quotes around an argument with a blank, and a backslash before its
    double quotes (``PDSHRunner.parse_user_args`` of DeepSpeed 0.19.8). pdsh replaces ``%n``, ``%h``
    and ``%u``.
    """
    text = argument.replace("%", "%%")
    return re.sub(r"([\\$`])", r"\\\1", text) if " " in text else shlex.quote(text)
