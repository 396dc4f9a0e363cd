"""Weights & Biases, on rank 0 only; its failures never end a run."""

import logging
import os
import re
from pathlib import Path

from llmtune.config.byte_sizes import parse_bytes
from llmtune.config.groups.tracker import TrackerConfig, TrackerMode
from llmtune.errors import (
    EXIT_DONE,
    EXIT_STOPPED,
    EXIT_UNEXPECTED,
    ConfigError,
    MissingPrerequisiteError,
)
from llmtune.security.trust import require_own
from llmtune.track.artifacts import ArtifactFiles, find_too_large, list_artifacts
from llmtune.track.service import SERVICES, Service, TrackedRun
from llmtune.track.tracker import Outcome, Record

_LIMIT = "tracker.artifact_max_bytes"
log = logging.getLogger(__name__)
_SETTING = re.compile(r"^\s*([^\s=:#;\[][^\s=:]*)\s*[=:]", re.MULTILINE)
#: Settings that ``wandb init`` and ``wandb offline`` write about a project.
_HARMLESS = {"project", "entity", "mode", "disabled"}
_EXIT_CODES = {
    Outcome.finished: EXIT_DONE,
    Outcome.stopped: EXIT_STOPPED,
    Outcome.failed: EXIT_UNEXPECTED,
}


class WandbTracker:
    """Sends every record to W&B; evaluation and training share the step axis."""

    def __init__(self, run: TrackedRun):
        """Start a run at W&B, or resume it.

        Raises:
            MissingPrerequisiteError: A file in the working folder tells W&B where to send the key.
        """
        import wandb

        check_working_folder()
        self._tracked = run
        config, mode = run.config, run.config.mode
        if mode is TrackerMode.online and not _has_key():
            mode = TrackerMode.offline
            run.say(
                "W&B: no WANDB_API_KEY in the environment or .env, so this run is tracked offline"
            )
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=run.name,
            id=run.run_id,
            resume="allow",
            dir=str(run.folder),
            mode="offline" if mode is TrackerMode.offline else "online",
            config={**run.settings, "plan": run.plan},
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

    def finish(self, outcome: Outcome) -> None:
        """Upload the rest, and close the run; W&B shows one that did not finish as failed."""
        if self._tracked.config.artifacts and outcome is Outcome.finished:
            self._tracked.write_report()
            for files in list_artifacts(self._tracked.folder):
                self._store(files)
        self._run.finish(exit_code=_EXIT_CODES[outcome])

    def _store(self, files: ArtifactFiles) -> None:
        """Store files as an artifact, a version of that of earlier starts; never fail."""
        import wandb

        limit = parse_bytes(self._tracked.config.artifact_max_bytes, _LIMIT)
        if problem := find_too_large(files, limit):
            self._tracked.say(f"W&B: {problem}")
            return
        kind = "report" if files.kind == "report" else "model"
        try:
            artifact = wandb.Artifact(f"{files.kind}-{self._tracked.run_id}", type=kind)
            for file in files.files:
                artifact.add_file(
                    str(file),
                    name=file.relative_to(files.folder).as_posix(),
                    # A copy is only made of what may change before it is sent.
                    policy="mutable" if files.may_change else "immutable",
                    skip_cache=True,
                )
            self._run.log_artifact(artifact, aliases=["latest", *files.aliases])
        except Exception as error:
            log.exception("W&B does not store the %s", files.kind)
            self._tracked.say(
                f"W&B: the {files.kind} is not stored ({type(error).__name__}: {error}); it is in"
                f" {files.folder}"
            )


def _find_problem(config: TrackerConfig) -> str | None:
    try:
        parse_bytes(config.artifact_max_bytes, _LIMIT)
    except ConfigError as error:
        return str(error)
    return None


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


SERVICES.register(
    Service(
        name="wandb",
        title="W&B",
        open=WandbTracker,
        package="wandb",
        own_keys=("artifacts", "artifact_max_bytes"),
        find_problem=_find_problem,
    )
)
