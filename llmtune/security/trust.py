"""Decide whose files are trusted, and open files of others: the rules of ``docs/security.md``.

Trusted are the command line, the environment, and files of this user. Not trusted is everything
inside a run, a checkpoint, a base, an adapter, a data set, a mirror or a host file, whoever wrote
it and wherever it is: a name on the command line says that it may be read, not that it may decide
what is executed, read elsewhere or overwritten.

What llmtune keeps for itself and believes later (caches, compiled ops, locks, swap, ``.env``) must
belong to this user or to root, and nobody else may write to it.
"""

import contextlib
import errno
import grp
import os
import pwd
import shutil
import stat
from pathlib import Path
from typing import IO, BinaryIO

from llmtune.errors import CheckpointError, LlmtuneError, MissingPrerequisiteError

#: Of a file that is read or copied whole: the largest tokenizers take some tens of megabytes.
MOST_BYTES = 256 << 20

#: Names in a Hugging Face cache: the folder of a model begins so, and has these two in it.
_HUB_PREFIX, _SNAPSHOTS, _BLOBS = "models--", "snapshots", "blobs"

_ROOT = 0
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


def find_objection(file: Path, most_bytes: int | None = MOST_BYTES) -> str | None:
    """Return why a file of an untrusted folder is not opened, as a phrase; None where it may be.

    It must be a regular file within its own folder. Links may lead to another file of that
    folder, and in a snapshot of the Hugging Face cache to the ``blobs`` of the same model, as the
    hub's own client lays them out.

    Args:
        most_bytes: Its largest size; None for weights, which are mapped and not read whole.
    """
    return _locate(file, most_bytes)[1]


def _locate(file: Path, most_bytes: int | None) -> tuple[Path, str | None]:
    """Return the real path of a file, and what :func:`find_objection` says of it."""
    try:
        place = file.resolve(strict=True)
        status = place.stat()
    except (OSError, RuntimeError) as error:
        # Python before 3.13 raises RuntimeError for a loop of links.
        return file, f"cannot be opened ({getattr(error, 'strerror', None) or 'links in a circle'})"
    reason = None
    if not any(place.is_relative_to(root) for root in _roots(file.parent)):
        reason = (
            f"is a link that leads out of its folder, to {place}; put the file itself there, or"
            " take the link away"
        )
    elif not stat.S_ISREG(status.st_mode):
        reason = "is no regular file"
    elif most_bytes is not None and status.st_size > most_bytes:
        reason = (
            f"has {status.st_size:,} bytes, more than the {most_bytes:,} that such a file may have"
        )
    return place, reason


def open_foreign(file: Path, error: type[LlmtuneError], most_bytes: int = MOST_BYTES) -> BinaryIO:
    """Open a file of an untrusted folder for reading; see :func:`find_objection`.

    Raises:
        LlmtuneError: Of the class ``error``, where it may not be opened.
    """
    place, reason = _locate(file, most_bytes)
    if reason is None:
        try:
            # Another user who may write to the folder can put a link or a pipe in its place
            # meanwhile.
            descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as cause:
            raise error(f"{file}: {cause.strerror}") from cause
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
        reason = "is no regular file"
    raise error(f"{file} {reason}")


def check_foreign(
    file: Path, error: type[LlmtuneError], most_bytes: int | None = MOST_BYTES
) -> None:
    """Refuse a file that a library will open by its name.

    Raises:
        LlmtuneError: Of the class ``error``, where it may not be opened.
    """
    reason = find_objection(file, most_bytes)
    if reason is not None:
        raise error(f"{file} {reason}")


def copy_foreign(
    file: Path, target: Path, error: type[LlmtuneError], most_bytes: int = MOST_BYTES
) -> None:
    """Copy the contents of a file of an untrusted folder.

    Raises:
        LlmtuneError: Of the class ``error``, where it may not be opened.
    """
    with open_foreign(file, error, most_bytes) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy)


def read_foreign(file: Path, error: type[LlmtuneError], most_bytes: int = MOST_BYTES) -> str:
    """Read the text of a file of an untrusted folder.

    Raises:
        LlmtuneError: Of the class ``error``, where it may not be opened.
        UnicodeDecodeError: It is no UTF-8.
    """
    with open_foreign(file, error, most_bytes) as source:
        return source.read(most_bytes).decode("utf-8")


def _roots(folder: Path) -> tuple[Path, ...]:
    """Return the folders that the real files of a folder may be in."""
    # The folder itself was named on the command line, and may be a link.
    real = folder.resolve()
    for place in (real, *real.parents):
        model = place.parent.parent
        if place.parent.name == _SNAPSHOTS and model.name.startswith(_HUB_PREFIX):
            blobs = model / _BLOBS
            # A link in its place could lead anywhere.
            return (place, blobs) if not blobs.is_symlink() else (place,)
    return (real,)


def trusted_owners() -> set[int]:
    """Return the user ids whose files are trusted like this user's own."""
    return {os.getuid(), _ROOT}


def find_owner_problem(path: Path) -> str | None:
    """Return who else may have written what is at ``path``; None for this user and root alone."""
    status = path.stat()
    if status.st_uid not in trusted_owners():
        return f"belongs to {_name_user(status.st_uid)}, and this is {_name_user(os.getuid())}"
    if status.st_mode & stat.S_IWOTH:
        return f"may be written by everybody (mode {stat.S_IMODE(status.st_mode):04o})"
    if status.st_mode & stat.S_IWGRP and not _is_private_group(status.st_gid, status.st_uid):
        return (
            f"may be written by the group {_name_group(status.st_gid)} (mode"
            f" {stat.S_IMODE(status.st_mode):04o})"
        )
    return None


def require_own(
    path: Path, what: str, instead: str, error: type[LlmtuneError] = MissingPrerequisiteError
) -> None:
    """Refuse a file or folder that other users may have written.

    Args:
        path: An existing file or folder.
        what: Its name for the user, such as a dotted key.
        instead: How to use another one, as the end of the message after "or".

    Raises:
        LlmtuneError: Of the class ``error``: it belongs to another user than this one and root, or
            others may write to it.
    """
    problem = find_owner_problem(path)
    if problem is not None:
        raise error(
            f"{what}: {path} {problem}, so that what is taken from there could be anybody's; "
            f"{describe_owner_fix(path)}, or {instead}"
        )


def describe_owner_fix(path: Path) -> str:
    """Describe the next step where :func:`find_owner_problem` found one."""
    status, command = path.stat(), owner_command(path)
    if status.st_uid in trusted_owners():
        return f"where nobody has changed anything in it, run: {command}"
    if os.getuid() == _ROOT:
        user = f"{status.st_uid}:{status.st_gid}"
        return (
            f"in a container, start it as that user (docker run --user {user}), or give it to root"
            f" ({command})"
        )
    return f"have it given to you ({command}, as root)"


def owner_command(path: Path) -> str:
    """Return the command that fixes what :func:`find_owner_problem` found."""
    if path.stat().st_uid in trusted_owners():
        return f"chmod -R go-w {path}"
    return f"chown -R {os.getuid()} {path}"


def make_own(folder: Path, what: str, instead: str) -> None:
    """Make a folder that only this user may open; an existing one must pass :func:`require_own`.

    Raises:
        MissingPrerequisiteError: It belongs to another user, or cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder")
    except OSError as error:
        raise MissingPrerequisiteError(
            f"{what}: {folder} cannot be made ({error.strerror}); {instead}"
        ) from error
    require_own(folder, what, instead)


def open_lock(path: Path) -> IO[str]:
    """Open a file that is going to be locked; make it where it is missing.

    Raises:
        MissingPrerequisiteError: Something else is in its place: whoever may write to the folder
            could have put a link to another file there.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "r+")
        os.close(descriptor)
    raise MissingPrerequisiteError(
        f"{path}: something else than a lock file is there, such as a link; remove it"
    )


def close_run_folder(folder: Path) -> str | None:
    """Make a run folder writable for its owner alone.

    A run folder is only read as data, so that it may belong to another user, such as the host's
    where a container runs as root.

    Returns:
        A sentence for the user where the mode was changed, otherwise None.

    Raises:
        CheckpointError: The folder is another user's, or shared on purpose like ``/tmp``.
    """
    status = folder.stat()
    shared = status.st_mode & stat.S_IWGRP and not _is_private_group(status.st_gid, status.st_uid)
    if not (status.st_mode & stat.S_IWOTH or shared):
        return None
    who, letters = (
        ("everybody", "go-w")
        if status.st_mode & stat.S_IWOTH
        else (f"the group {_name_group(status.st_gid)}", "g-w")
    )
    if status.st_uid != os.getuid() or status.st_mode & stat.S_ISVTX:
        raise CheckpointError(
            f"output_dir={folder}: {who} may write there, so that what is loaded from it could be"
            " anybody's; take another output_dir=, such as a new folder in it, or have its owner"
            f" run: chmod {letters} {folder}"
        )
    folder.chmod(stat.S_IMODE(status.st_mode) & ~_WRITABLE)
    return f"{folder} could be written by {who}; took that right away (chmod {letters})"


def check_links(folder: Path) -> None:
    """Refuse links in a run folder that lead out of it, before anything is written to them.

    Links to folders are allowed: nothing in another folder is overwritten, and a checkpoint may
    have been moved to another disk.

    Raises:
        CheckpointError: With the first one.
    """
    root = folder.resolve()
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() and not entry.is_dir() and not entry.resolve().is_relative_to(root):
            raise CheckpointError(
                f"{entry} is a link that leads out of the run folder, to {entry.resolve()}, which a"
                " run would write over; remove it, or take another output_dir="
            )


def _is_private_group(group: int, owner: int) -> bool:
    """Tell whether the group is the private one that many systems make for each user.

    Such systems have a umask of 002, so that all files of a user are writable for this group.
    """
    try:
        entry, name = grp.getgrgid(group), pwd.getpwuid(owner).pw_name
    except KeyError:
        # A container that was started with ids which its /etc/passwd does not know.
        return group == owner == os.getuid()
    return entry.gr_name == name and set(entry.gr_mem) <= {name}


def _name_user(number: int) -> str:
    try:
        return f"{pwd.getpwuid(number).pw_name} (uid {number})"
    except KeyError:
        return f"uid {number}"


def _name_group(number: int) -> str:
    try:
        return f"{grp.getgrgid(number).gr_name} (gid {number})"
    except KeyError:
        return f"gid {number}"
