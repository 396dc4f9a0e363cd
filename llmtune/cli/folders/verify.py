"""``verify``: check checkpoints, trained models and exports against their manifests.

Their tensors are also checked for values that are not finite.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.cli.arguments import Options
from llmtune.cli.output import stdout_for_us
from llmtune.config.composed import Composed
from llmtune.config.schema import Config
from llmtune.errors import EXIT_DONE, CheckpointError, ConfigError
from llmtune.security.terminal import to_json_line, to_terminal
from llmtune.storage import layout
from llmtune.storage.lock import hold_lock
from llmtune.storage.manifest import find_damage, read_manifest
from llmtune.storage.signature import find_forgery, read_public_key
from llmtune.track.console import Console
from llmtune.track.status import Status
from llmtune.units import counted, format_bytes

if TYPE_CHECKING:
    from llmtune.checkpoint.mirror import Mirror

#: Seconds to wait for copies: a week, because the user asked for them.
_COPY_SECONDS = 7 * 86400.0

#: The replacement of a password in a stored URL.
_HIDDEN = "***"


def run(composed: Composed, options: Options) -> int:
    """Print a line per folder; the exit code is 5 if anything is wrong."""
    config = composed.config
    folders = _named_folders(config)
    key = Path(config.key).expanduser() if config.key else None
    if key is not None:
        read_public_key(key)
    mirror = _open_mirror(config) if options.mirror else None
    reports, not_copied = [], list[tuple[str, str]]()
    status = Status(Console(sys.stderr), "checking")
    with status, stdout_for_us() as write:
        for number, folder in enumerate(folders, start=1):
            status.doing = f"checking {folder.name}"
            status.how_far = partial("{} of {}".format, number, len(folders))
            reports.append(_report(folder, key))
            if not options.as_json:
                write(_to_text(reports[-1]))

        # Copies, only of checkpoints that are whole.
        bad = sum(not report["healthy"] for report in reports)
        status.doing, status.how_far = "copying to the mirror", str
        if mirror is not None:
            healthy = [Path(report["path"]) for report in reports if report["healthy"]]
            run = Path(str(config.target.run)).expanduser()
            checkpoints = [
                folder for folder in healthy if layout.checkpoint_step(folder) is not None
            ]
            not_copied = _copy(mirror, run, checkpoints)

        # What was checked, and what a check without a key cannot show.
        if options.as_json:
            copies = {} if mirror is None else {"not_copied": dict(not_copied)}
            write(
                to_json_line({"healthy": bad == 0, "folders": reports, **copies}, indent=1) + "\n"
            )
        else:
            if not bad and key is None:
                write("checked for damage, not for tampering (key=PUBLIC.pem checks signatures)\n")
            elif not bad:
                write(f"all files are as they were signed with the private key of {key}\n")
            if mirror is not None and not not_copied:
                write(f"ok  {mirror.url} has every checkpoint that is whole\n")

    # What is missing at the mirror, and what is damaged.
    for name, reason in not_copied:
        sys.stderr.write(to_terminal(f"{name} is not at checkpoint.mirror: {reason}\n"))
    if not_copied and not bad:
        return CheckpointError.exit_code
    if bad:
        sys.stderr.write(f"{bad} of {counted(len(reports), 'folder')} cannot be relied on\n")
        return CheckpointError.exit_code
    return EXIT_DONE


def _named_folders(config: Config) -> list[Path]:
    """List the folders that the command line names; of a run, all that it has published.

    Raises:
        ConfigError: Nothing is named.
        CheckpointError: The run has nothing to verify.
    """
    given = (config.target.checkpoint, config.target.adapter, config.target.base)
    folders = [Path(place).expanduser() for place in given if place]
    if config.target.run:
        folders = _run_folders(Path(config.target.run).expanduser()) + folders
    if not folders:
        raise ConfigError(
            "verify needs run=FOLDER, checkpoint=FOLDER, adapter=FOLDER or base=FOLDER (an export)"
        )
    return folders


def _open_mirror(config: Config) -> Mirror:
    """Open the mirror of the run.

    Raises:
        ConfigError: No run is named, or none with a mirror.
        CheckpointError: It is no run folder.
    """
    from llmtune.checkpoint.mirror import Mirror
    from llmtune.config.stored import load_config
    from llmtune.train.run_folder import RunFolder

    if config.target.run is None:
        raise ConfigError("verify --mirror needs run=FOLDER")
    run = RunFolder(Path(config.target.run).expanduser())
    url = config.checkpoint.mirror or load_config(run.path / layout.CONFIG).checkpoint.mirror
    if url is None or _HIDDEN in url:
        why = "it has none" if url is None else "a run folder holds no passwords"
        raise ConfigError(
            f"verify --mirror: name the mirror of {run.path} with checkpoint.mirror=URL ({why})"
        )
    record = run.read_record()
    if record.run_name is None:
        raise CheckpointError(
            f"run={run.path}: no {layout.PLAN} in it; verify --mirror takes a run folder"
        )
    return Mirror(url, record.run_name, lambda _: None, record.run_id or "")


def _copy(mirror: Mirror, run: Path, checkpoints: list[Path]) -> list[tuple[str, str]]:
    """Copy what the mirror lacks; return what failed, each with the reason.

    Raises:
        CheckpointError: The run is under way, which copies itself: two that write to one place undo
            each other's work.
    """
    with hold_lock(run / layout.LOCK):
        for folder in checkpoints:
            mirror.put(folder, None)
        return mirror.finish(_COPY_SECONDS)


def _run_folders(run: Path) -> list[Path]:
    """List the run's checkpoints, oldest first, incomplete ones too; its model; its exports."""
    inside = list(run.iterdir()) if run.is_dir() else []
    steps = {entry: layout.checkpoint_step(entry) for entry in inside}
    checkpoints = [(step, entry) for entry, step in steps.items() if step is not None]
    folders = [entry for _, entry in sorted(checkpoints)]
    folders += [run / name for name in (layout.ADAPTER, layout.MODEL) if (run / name).is_dir()]
    exports = [entry for entry in inside if entry.is_dir() and layout.is_export_folder(entry)]
    folders += sorted(exports, key=lambda entry: (entry.name != layout.MERGED, entry.name))
    if not folders:
        raise CheckpointError(
            f"run={run}: no checkpoint and no trained model in it; verify takes a folder such as"
            " runs/NAME"
        )
    return folders


def _report(folder: Path, key: Path | None) -> dict[str, Any]:
    """Check one folder; return the values that ``--json`` prints.

    Args:
        key: Public key of the signature that is required.
    """
    problems = _find_problems(folder)
    if key is not None and folder.is_dir():
        problems += find_forgery(folder, key)
    checked = "damage" if key is None else "damage and tampering"
    report: dict[str, Any] = {
        "path": str(folder),
        "healthy": not problems,
        "problems": problems,
        "checked_for": checked,
    }
    if not problems:
        manifest = read_manifest(folder)
        sizes = [entry["size"] for entry in manifest["files"].values()]
        report |= {"files": len(sizes), "bytes": sum(sizes), "step": manifest.get("step")}
    return report


def _find_problems(folder: Path) -> list[str]:
    from llmtune.storage.tensors.tensor_checks import find_bad_tensors, find_untrained_adapter

    if not folder.is_dir():
        return ["no such folder"]
    if not any((folder / name).is_file() for name in (layout.MANIFEST, layout.COMPLETE)):
        return [f"not written by llmtune (no {layout.MANIFEST}), so it cannot be checked"]
    problems = find_damage(folder)
    damaged = {problem.split(" ", 1)[0] for problem in problems}
    for file in sorted(folder.rglob("*.safetensors")):
        # A link is among the damage already, and may lead anywhere. What is damaged is said once.
        if (
            file.is_file()
            and not file.is_symlink()
            and str(file.relative_to(folder)) not in damaged
        ):
            problems += find_bad_tensors(file)
            problems += find_untrained_adapter(file) if file.name == layout.ADAPTER_WEIGHTS else []
    return problems


def _to_text(report: dict[str, Any]) -> str:
    if not report["healthy"]:
        return f"BAD {report['path']}\n" + "".join(
            f"      {problem}\n" for problem in report["problems"]
        )
    step = "" if report["step"] is None else f", step {report['step']}"
    return f"ok  {report['path']}  {report['files']} files, {format_bytes(report['bytes'])}{step}\n"
