"""Weights & Biases, on rank 0 only; its failures never end a run."""

import os
import re
import secrets
from pathlib import Path

from llmtune.config.groups.tracker import TrackerMode
from llmtune.errors import MissingPrerequisiteError
from llmtune.security.redaction import redact, redact_values
from llmtune.security.trust import require_own
from llmtune.storage import layout
from llmtune.storage.atomic import write_atomically
from llmtune.track.service import SERVICES, Service, TrackedRun
from llmtune.track.tracker import Record

_SETTING = re.compile(r"^\s*([^\s=:#;\[][^\s=:]*)\s*[=:]", re.MULTILINE)
#: Settings that ``wandb init`` and ``wandb offline`` write about a project.
_HARMLESS = {"project", "entity", "mode", "disabled"}


class WandbTracker:
    """Sends every record to W&B; evaluation and training share the step axis."""

    def __init__(self, run: TrackedRun):
        """Start a run at W&B, or resume it.

        Raises:
            MissingPrerequisiteError: A file in the working folder tells W&B where to send the key.
        """
        import wandb

        check_working_folder()
        config, mode = run.config, run.config.mode
        if mode is TrackerMode.online and not _has_key():
            mode = TrackerMode.offline
            run.say(
                "W&B: no WANDB_API_KEY in the environment or .env, so this run is tracked offline"
            )
        self._run = wandb.init(
            project=redact(config.project),
            entity=redact(config.entity) if config.entity else None,
            name=redact(run.name),
            id=_run_id(run.folder),
            resume="allow",
            dir=str(run.folder),
            mode="offline" if mode is TrackerMode.offline else "online",
            config=redact_values(run.settings),
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=60,
                # The command line and the address of the git remote may hold secrets.
                x_disable_meta=True,
                disable_git=True,
                disable_code=True,
            ),
        )

    def log(self, record: Record) -> None:
        """Send a record, under its step."""
        values = {key: value for key, value in record.items() if key != "step"}
        self._run.log(values, step=record["step"])

    def summarize(self, values: Record) -> None:
        """Set values of the run's summary."""
        self._run.summary.update(values)

    def finish(self) -> None:
        """Upload the rest, and close the run."""
        self._run.finish()


def check_working_folder() -> None:
    """Refuse ``wandb/settings`` in the working folder, which W&B reads by itself.

    The folder may come from somebody else, and the file can name a server, a proxy or certificates
    that W&B would then give the key to. What ``wandb init`` writes is allowed.

    Raises:
        MissingPrerequisiteError: It belongs to another user, or sets something else.
    """
    for file in (Path(folder, "settings") for folder in ("wandb", ".wandb")):
        if not file.is_file():
            continue
        require_own(file, "W&B's settings", "run llmtune from another folder")
        keys = set(_SETTING.findall(file.read_text(encoding="utf-8", errors="replace"))) - _HARMLESS
        if keys:
            raise MissingPrerequisiteError(
                f"{file} in the working folder sets {', '.join(sorted(keys))}, which is not taken"
                " from there; move it to ~/.config/wandb/settings, or set it in the environment"
                " (WANDB_BASE_URL)"
            )


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(errors="replace")


def _run_id(run_folder: Path) -> str:
    """Return the sweep agent's id, or one kept in the run folder, so that a run is resumed."""
    if agents_id := os.environ.get("WANDB_RUN_ID"):
        return agents_id
    path = run_folder / layout.TRACKER_RUN_ID
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, secrets.token_hex(4))
    return path.read_text().strip()


SERVICES.register(Service(name="wandb", title="W&B", open=WandbTracker))
