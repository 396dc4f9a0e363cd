"""The files of a finished run that a tracker stores beside its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmtune.storage import layout
from llmtune.storage.rank_files import FinishedRecord
from llmtune.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFiles:
    """Files that belong together."""

    kind: str
    """``adapter``, ``model``, ``checkpoint`` or ``report``."""
    folder: Path
    """The folder that names of files are relative to."""
    files: Sequence[Path]
    aliases: Sequence[str] = ()
    may_change: bool = False
    """Tell whether the files may be written again after this."""

    @property
    def nbytes(self) -> int:
        """Return the size of all files."""
        return sum(file.stat().st_size for file in self.files)


def list_artifacts(run: Path) -> Iterator[ArtifactFiles]:
    """Yield what a finished run has to store: what was trained, the best checkpoint, the report.

    The state of the optimizer is left out, and so is a best checkpoint that was published: there
    the model itself is called ``best``.
    """
    finished = FinishedRecord.read(run)
    best = finished.best["step"] if finished is not None and finished.best else None
    is_best = finished is not None and best is not None and best == finished.published_step
    for has_adapter in (True, False):
        folder = layout.result_folder(run, has_adapter)
        if folder.is_dir():
            aliases = ("best",) if is_best else ()
            yield _of_folder(folder.name, folder, aliases)
    if best is not None and not is_best:
        folder = layout.checkpoint_folder(run, best)
        if folder.is_dir():
            yield _of_folder("checkpoint", folder, ("best", f"step-{best}"))
    report = run / layout.REPORT
    if report.is_file():
        yield ArtifactFiles(kind="report", folder=run, files=[report], may_change=True)


def find_too_large(artifact: ArtifactFiles, limit_bytes: int) -> str | None:
    """Explain why files are not stored; None for those that are."""
    if artifact.nbytes <= limit_bytes:
        return None
    return (
        f"the {artifact.kind} of {format_bytes(artifact.nbytes)} is not stored:"
        f" tracker.artifact_max_bytes={limit_bytes} is less"
    )


def _of_folder(kind: str, folder: Path, aliases: Sequence[str]) -> ArtifactFiles:
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not file.is_symlink() and not layout.is_state_file(file.name)
    )
    return ArtifactFiles(kind=kind, folder=folder, files=files, aliases=aliases)
