"""Find the folder of one step in a checkpoint that DeepSpeed wrote."""

from pathlib import Path

from llmtune.errors import ExportError
from llmtune.units import some

#: The next step of a user whose checkpoint is not complete.
COPY_AGAIN = "copy the whole folder again, or take an older checkpoint"

#: Names the newest step; written by ``DeepSpeedEngine.save_checkpoint``.
_LATEST = "latest"
_ANY_FILE = "*_states.pt"


def is_zero_checkpoint(folder: Path) -> bool:
    """Return whether a folder, or one directly in it, holds files of DeepSpeed's ranks.

    The files are not opened.
    """
    return folder.is_dir() and bool(_folders_with_files(folder))


def find_step_folder(folder: Path) -> Path:
    """Return the folder with the files of the ranks: ``folder`` itself, or one in it.

    Raises:
        ExportError: There is none, or there are several and ``latest`` does not name one of them.
    """
    candidates = _folders_with_files(folder) if folder.is_dir() else []
    if folder in candidates:
        return folder
    latest = folder / _LATEST
    if latest.is_file():
        return _read_latest(folder, latest)
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        names = [candidate.name for candidate in candidates]
        raise ExportError(
            f"{folder} has no file {_LATEST} and several checkpoints: {some(names)}; name one of"
            " them"
        )
    raise ExportError(f"{folder} holds no checkpoint of DeepSpeed (*_optim_states.pt)")


def _read_latest(folder: Path, latest: Path) -> Path:
    name = latest.read_text(errors="replace").strip()
    step = folder / name
    if not name or not step.resolve().is_relative_to(folder.resolve()):
        raise ExportError(f"{latest} names {name!r}, which is not a folder inside {folder}")
    if not any(step.glob(_ANY_FILE)):
        raise ExportError(
            f"{latest} names {name}, which holds no checkpoint of DeepSpeed; {COPY_AGAIN}"
        )
    return step


def _folders_with_files(folder: Path) -> list[Path]:
    """Return the folder itself, or those in it, with files of ranks."""
    if any(folder.glob(_ANY_FILE)):
        return [folder]
    return sorted({file.parent for file in folder.glob(f"*/{_ANY_FILE}")})
