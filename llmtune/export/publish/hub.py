"""Upload a published export to the Hugging Face hub in one commit, so that nobody sees half of it.

Large files are sent before the commit. The hub knows them by their hash, so that a second attempt
does not send them again.

``HfApi.upload_folder`` is no replacement: where hf_xet is installed, which huggingface_hub 2 asks
for, it makes several commits (``_upload_pipeline.py``: a new one after 5 minutes, 250 files or
100 MB of small files). Somebody who loads the repository meanwhile, or after the upload was
killed, gets some files of this export and some of the one before. It also says nothing of what the
hub holds in the end, which is compared here.
"""

import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.errors import ExportError, MissingPrerequisiteError, first_line
from llmtune.security.redaction import redact
from llmtune.storage import layout
from llmtune.storage.hashing import git_blob_id, sha256_file
from llmtune.storage.plain_json import parse_json
from llmtune.storage.remote import PermanentCopyError, list_files, marker_of
from llmtune.units import format_bytes

HUB = "hf://"

_URL = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<branch>[\w./-]+))?/*")
#: First parts of addresses that are not those of models.
_NO_MODELS = ("datasets", "spaces", "models", "buckets")
#: What the hub puts into a new repository.
_OF_THE_HUB = {".gitattributes"}
#: HTTP answers after which another try may help.
_PASSING = {408, 409, 412, 425, 429}
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class HubPlace:
    """A branch of a model repository."""

    repo: str
    branch: str | None


@dataclass(frozen=True, slots=True)
class _Remote:
    """The state of a repository."""

    commit: str
    files: dict[str, Any]
    """Path -> the hub's description of the file."""
    stale: frozenset[str]
    """Files of the export that it holds."""


def parse_hub_url(url: str) -> HubPlace:
    """Parse ``hf://user/name`` or ``hf://user/name@branch``.

    Raises:
        ExportError: It is neither.
    """
    match = _URL.fullmatch(url)
    if match is None or match["repo"].split("/")[0] in _NO_MODELS:
        raise ExportError(
            f"export.upload={redact(url)}: a model on the hub is hf://user/name, a branch of it"
            " hf://user/name@branch"
        )
    return HubPlace(match["repo"], match["branch"])


def resolve_token(url: str) -> str:
    """Read the token of the environment.

    Raises:
        MissingPrerequisiteError: There is none.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise MissingPrerequisiteError(
            f"export.upload={redact(url)}: HF_TOKEN is not set; put a token with the right to write"
            " (https://huggingface.co/settings/tokens) into the environment or into .env"
        )
    return token


def is_export_manifest(text: bytes) -> bool:
    """Tell whether a manifest is that of an export; those of checkpoints name no format."""
    with suppress(ValueError, TypeError, KeyError):
        manifest = parse_json(text)
        return isinstance(manifest["files"], dict) and isinstance(manifest["format"], str)
    return False


def upload_to_hub(folder: Path, url: str, private: bool, say: Callable[[str], None]) -> None:
    """Make one attempt; a further one sends only what is still missing.

    Args:
        private: A repository that is made for this is private.
        say: Takes a line for the user.

    Raises:
        PermanentCopyError: Trying again does not help.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    place = parse_hub_url(url)
    try:
        _upload(HfApi(token=resolve_token(url)), place, folder, private, say)
    except OfflineModeIsEnabled as error:
        raise PermanentCopyError("was not filled: HF_HUB_OFFLINE is set; unset it") from error
    except HFValidationError as error:
        raise PermanentCopyError(f"is no name of a repository: {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 500
        if 400 <= status < 500 and status not in _PASSING:
            raise PermanentCopyError(
                f"was not filled: {first_line(error)}. Does HF_TOKEN have the right to write to"
                f" {place.repo}?"
            ) from error
        raise


def _upload(
    api: Any, place: HubPlace, folder: Path, private: bool, say: Callable[[str], None]
) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api.create_repo(place.repo, private=private, exist_ok=True)
    if place.branch is not None:
        api.create_branch(place.repo, branch=place.branch, exist_ok=True)

    # What the repository lacks, and what an earlier export left in it.
    remote = _read_remote(api, place, private, say)
    files = {
        file.relative_to(folder).as_posix(): file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    adds = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=file)
        for name, file in files.items()
        if not _is_same(file, remote.files.get(name))
    ]
    deletes = [
        CommitOperationDelete(path_in_repo=name, is_folder=False)
        for name in sorted(remote.stale - files.keys())
    ]
    if not adds and not deletes:
        say(
            f"{HUB}{place.repo} holds this export already: {len(files)} files, compared by their"
            " hashes"
        )
        return

    # Large files first, outside of any commit; then one commit on the state that was read.
    for count, add in enumerate(adds, start=1):
        api.preupload_lfs_files(place.repo, [add], revision=place.branch, free_memory=False)
        size = format_bytes(files[add.path_in_repo].stat().st_size)
        say(f"sent {add.path_in_repo}  {size}  ({count}/{len(adds)})")
    commit = api.create_commit(
        place.repo,
        [*adds, *deletes],
        commit_message="Upload an export of llmtune",
        revision=place.branch,
        parent_commit=remote.commit,
    )

    # Compare what the hub holds now.
    arrived = _list_files(api, place.repo, commit.oid)
    wrong = [name for name, file in files.items() if not _is_same(file, arrived.get(name))]
    if wrong:
        raise OSError(
            f"{', '.join(wrong[:5])} arrived with other contents than they were sent with"
        )
    say(
        f"uploaded {len(adds)} files to {HUB}{place.repo} in one commit; all compared by their"
        " hashes"
    )


def _read_remote(api: Any, place: HubPlace, private: bool, say: Callable[[str], None]) -> _Remote:
    """
    Raises:
        PermanentCopyError: The repository holds something that is no export of llmtune.
    """
    info = api.repo_info(place.repo, revision=place.branch)
    if private and info.private is False:
        say(f"{HUB}{place.repo} was there before and is public")
    files = _list_files(api, place.repo, info.sha)
    others = sorted(files.keys() - _OF_THE_HUB)
    if not others:
        return _Remote(info.sha, files, frozenset())
    text = _read_manifest(api, place.repo, info.sha) if layout.MANIFEST in files else b""
    if not is_export_manifest(text):
        raise PermanentCopyError(
            f"holds {', '.join(others[:5])}, which is no export of llmtune; take another repository"
            " or branch"
        )
    return _Remote(
        info.sha, files, frozenset(files.keys() & list_files(marker_of(text), text).keys())
    )


def _list_files(api: Any, repo: str, commit: str) -> dict[str, Any]:
    tree = api.list_repo_tree(repo, recursive=True, revision=commit)
    return {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}


def _read_manifest(api: Any, repo: str, commit: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = api.hf_hub_download(repo, layout.MANIFEST, revision=commit, local_dir=folder)
        return Path(file).read_bytes()


def _is_same(file: Path, remote: Any | None) -> bool:
    """Tell whether the hub has these bytes: it names large files by SHA-256, others as git does."""
    if remote is None or remote.size != file.stat().st_size:
        return False
    if remote.lfs is not None:
        return bool(sha256_file(file) == remote.lfs.sha256)
    return bool(git_blob_id(file) == remote.blob_id)
