"""Save checkpoints during the run, and publish the trained model at its end."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Container
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtune.checkpoint.find import find_checkpoints
from llmtune.checkpoint.mirror import Mirror
from llmtune.checkpoint.optimizer_files import state_specs
from llmtune.checkpoint.result import choose_result, link_result
from llmtune.checkpoint.retention import (
    Retention,
    list_checkpoints,
    prune_checkpoints,
    read_metrics_of,
)
from llmtune.checkpoint.save import DiskRefusedError, PendingSave, SaveRequest, begin_save
from llmtune.checkpoint.trainer_state import TrainerState
from llmtune.checkpoint.weight_files import WeightFiles
from llmtune.checkpoint.writer import Buffers
from llmtune.config.best_model import BestModel
from llmtune.config.groups.checkpoint import OnDiskLow
from llmtune.draws import DRAWS_VERSION
from llmtune.engine.distributed import all_reduce_any, all_reduce_sum, gather_objects
from llmtune.engine.train_module import TrainModule
from llmtune.errors import CheckpointError
from llmtune.plan.steps import Interval
from llmtune.storage import layout
from llmtune.storage.manifest import is_complete
from llmtune.storage.rank_files import FinishedRecord
from llmtune.storage.signature import Signer
from llmtune.track.tracker import Record
from llmtune.train.memory_usage import spare_host_memory_bytes
from llmtune.train.training_state import TrainingState
from llmtune.units import counted, format_bytes

#: Copies for a save in the background may take this share of the host memory that training leaves.
_COPY_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSettings:
    """The user's choices, and the values that every manifest of the run has."""

    run: Path
    weights: WeightFiles
    retention: Retention
    saves: Interval
    evaluations: Interval
    background: bool | str
    on_disk_low: OnDiskLow
    best: BestModel | None
    """The rule by which the best model is chosen."""
    data_fingerprint: str
    planned_host_bytes: int
    """The planned peak per rank."""
    about: dict[str, Any]
    signer: Signer | None = None
    """The signer on rank 0, where checkpoints are signed."""


class CheckpointSaver:
    """Write ``checkpoint-<step>`` folders, prune old ones, and link the last one as the result.

    One checkpoint is written at a time. All ranks have one of these, and call its methods in the
    same order.
    """

    def __init__(
        self,
        module: TrainModule,
        settings: SaveSettings,
        model_files: dict[str, bytes],
        start: tuple[Path, TrainerState] | None,
        say: Callable[[str], None],
        mirror: Mirror | None = None,
    ):
        """
        Args:
            model_files: The files beside the weights; see
                :func:`~llmtune.train.model_files.render_model_files`.
            start: The checkpoint that the run resumes from, which may be another run's.
        """
        self.module = module
        self.settings = settings
        self.model_files = model_files
        self.say = say
        self.mirror = mirror
        self._newest: Path | None = None
        self._metrics: Record = {}
        if start is not None:
            own_folder = layout.checkpoint_folder(settings.run, start[1].step)
            # A checkpoint of another run, or one that was set aside, is saved again in this run.
            if start[0].resolve() == own_folder.resolve():
                self._newest = own_folder
            self._metrics = {"step": start[1].step, **read_metrics_of(start[0])}
        self._pending: PendingSave | None = None
        self._buffers = Buffers(module.rank.device)
        self._pause: float | None = None
        # Neither changes during the run.
        self._own_files = {**settings.weights.own_specs(module), **state_specs(module)}
        self._own_bytes = sum(spec.nbytes for specs in self._own_files.values() for spec in specs)
        self._bytes = int(all_reduce_sum([float(self._own_bytes)], module.rank)[0])

    def prepare(self, step: int) -> None:
        """Check the room for all checkpoints that will exist at once, before the first step.

        Collective.

        Args:
            step: The step that the run begins at.

        Raises:
            CheckpointError: There is not enough, and ``checkpoint.on_disk_low=stop``.
        """
        # The room that is needed beside the checkpoints that are here.
        keeps_best = self.settings.retention.best is not None
        saves = self.settings.saves.count(step) + 1
        if keeps_best:
            saves += self.settings.evaluations.count(step)
        limit = self.settings.retention.limit
        # A new checkpoint is written before the oldest is removed; the best is kept beside them.
        at_once = saves if limit is None else min(saves, limit + 1 + keeps_best)
        if self.settings.on_disk_low is not OnDiskLow.stop:
            at_once = 1
        present = len(list_checkpoints(self.settings.run)) if limit is not None else 0
        self._make_room(
            max(1, at_once - present),
            f"{counted(at_once, 'checkpoint')} of {format_bytes(self._bytes)}",
        )

        # Allocate the host memory for copies now: fresh pages would slow down the first save.
        if self._has_memory():
            self._buffers.reserve(self._own_files)
            how = (
                f"written during training, from copies of {format_bytes(self._own_bytes)} per rank"
                " in host memory"
            )
        else:
            how = "training waits while they are written"
        self.say(f"checkpoints of {format_bytes(self._bytes)}: {how}")
        if self.mirror is not None:
            # Copy what the last start had no time for; the mirror sends nothing twice.
            for folder in find_checkpoints(self.settings.run):
                self.mirror.put(folder, None)

    def record_evaluation(self, record: Record) -> None:
        """Record an evaluation, for the next manifest."""
        self._metrics = record
        if self._newest == layout.checkpoint_folder(self.settings.run, record["step"]):
            # It was saved when its evaluation was interrupted, and lacks the metrics.
            self._newest = None

    def save(self, progress: TrainingState) -> Path:
        """Begin to write the checkpoint of this step, unless it exists. Collective.

        Raises:
            CheckpointError: There is no room, or the previous one could not be written.
        """
        folder = layout.checkpoint_folder(self.settings.run, progress.step)
        if folder == self._newest:
            return folder

        # Wait for the previous save, and make room for this one.
        started = time.monotonic()
        self.finish()
        if not self._make_room(1, f"{folder.name} of {format_bytes(self._bytes)}"):
            return folder

        # The manifest has the metrics only if they were evaluated at this very step.
        self.module.rank.phases.enter("save")
        metrics = {key: value for key, value in self._metrics.items() if key != "step"}
        at_this_step = metrics if self._metrics.get("step") == progress.step else {}
        about = {
            **self.settings.about,
            "step": progress.step,
            "tokens": progress.tokens,
            "metrics": at_this_step,
        }

        # Copy the tensors and write them in a thread, or write them now.
        background = self._has_memory()
        request = SaveRequest(
            folder=folder,
            state=self._state(progress),
            weights=self.settings.weights,
            model_files={**self.model_files, **self._history()},
            about=about,
            signer=self.settings.signer,
            published=self._published,
        )
        self._pending = begin_save(self.module, request, self._buffers if background else None)
        self._newest = folder
        if not background:
            self.finish()
        self._pause = (self._pause or 0.0) + time.monotonic() - started
        return folder

    @property
    def is_writing(self) -> bool:
        """Tell whether this rank still writes a checkpoint in the background."""
        return self._pending is not None and not self._pending.has_ended

    @property
    def has_failed(self) -> bool:
        """Tell whether this rank knows that the save in progress has failed."""
        return self._pending is not None and self._pending.has_failed

    def finish(self) -> None:
        """Wait for the save in progress. Collective.

        Raises:
            CheckpointError: It could not be written, and ``checkpoint.on_disk_low`` is not
                ``skip``; or what was written is unusable.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.finish()
        except DiskRefusedError as error:
            self._newest = None
            if self.settings.on_disk_low is not OnDiskLow.skip:
                raise
            self.say(f"{error} (checkpoint.on_disk_low=skip: training continues)")
            return
        self.say(
            f"{pending.folder.name}: {format_bytes(self._bytes)} in {pending.seconds:.2f} s; "
            f"training paused for {pending.pause_seconds:.2f} s"
        )
        if self._buffers.nbytes > _COPY_SHARE * self._spare_memory():
            self._buffers.release()

    def close(self, timeout_seconds: float) -> None:
        """Wait for the mirror."""
        if self.mirror is None:
            return
        deadline = time.monotonic() + timeout_seconds
        while self.mirror.busy and time.monotonic() < deadline:
            self.mirror.finish(1.0)
            self.module.rank.phases.beat()
        for name, reason in self.mirror.finish(0.0):
            self.say(
                f"warning: {name} is not at checkpoint.mirror: {reason}; the next start copies it"
                f" first, and so does llmtune verify run={self.settings.run} --mirror"
            )
        # Checkpoints that were due for removal while they were being copied.
        prune_checkpoints(self.settings.run, self.settings.retention, self._busy())

    def pause_seconds(self) -> float | None:
        """Return the pause since the last call; None where nothing was saved."""
        pause, self._pause = self._pause, None
        return pause

    def publish_result(self, progress: TrainingState) -> Path:
        """Link a checkpoint's model as ``adapter/`` or ``model/``, and mark the run's end.

        It is the last checkpoint, or the best one with ``train.load_best_model_at_end``.

        Raises:
            CheckpointError: The last checkpoint could not be saved.
        """
        run = self.settings.run
        result = layout.result_folder(run, self.settings.weights.adapter_only)
        if self.module.rank.is_first:
            checkpoint = layout.checkpoint_folder(run, progress.step)
            if not is_complete(checkpoint):
                raise CheckpointError(
                    f"{checkpoint} could not be saved, so that there is no trained model to publish"
                )
            rule = self.settings.best
            best = progress.best.describe(rule)
            loads_best = rule is not None and rule.load_at_end
            chosen = choose_result(checkpoint, rule, progress.best, self.say)
            about = {"best": best, "last_step": progress.step} if loads_best else {}
            link_result(chosen, result, self.settings.signer, about)
            FinishedRecord(
                step=progress.step,
                tokens=progress.tokens,
                best=best,
                goal=rule.goal if rule is not None else None,
                published_step=layout.checkpoint_step(chosen),
                loaded_best=loads_best,
                stale_evaluations=progress.best.stale,
                stopped_early=progress.step < self.settings.saves.plan.total_steps,
            ).write(run)
        return result

    def _state(self, progress: TrainingState) -> TrainerState:
        return TrainerState(
            step=progress.step,
            tokens=progress.tokens,
            skipped=progress.skipped,
            data_fingerprint=self.settings.data_fingerprint,
            data_position=progress.data_position,
            evaluation_due=progress.evaluation_due,
            best=progress.best.describe(self.settings.best),
            best_goal=self.settings.best.goal if self.settings.best is not None else None,
            stale_evaluations=progress.best.stale,
            tracker_run_id=_read_text(self.settings.run / layout.TRACKER_RUN_ID),
            draws_version=DRAWS_VERSION,
            line=asdict(progress.line) if progress.line.steps else None,
        )

    def _history(self) -> dict[str, bytes]:
        """Read the metrics so far, for a resume without the run folder."""
        if not self.module.rank.is_first:
            return {}
        path = self.settings.run / layout.METRICS
        return {layout.METRICS: path.read_bytes() if path.is_file() else b""}

    def _published(self, folder: Path) -> None:
        """Mirror a complete checkpoint and prune older ones, on rank 0."""
        run, retention = self.settings.run, self.settings.retention
        if self.mirror is not None:
            removed = {kept.folder.name for kept in retention.to_remove(list_checkpoints(run))}
            self.mirror.put(folder, {kept.folder.name for kept in list_checkpoints(run)} - removed)
        prune_checkpoints(run, retention, self._busy())

    def _busy(self) -> Container[Path]:
        return self.mirror.busy if self.mirror is not None else ()

    def _has_memory(self) -> bool:
        """Tell whether the copies fit beside what training needs, on every rank. Collective."""
        if self.settings.background != "auto":
            return bool(self.settings.background)
        needed = self._own_bytes - self._buffers.nbytes
        lacking = needed > _COPY_SHARE * self._spare_memory()
        return not all_reduce_any([lacking], self.module.rank)[0]

    def _spare_memory(self) -> int:
        return spare_host_memory_bytes(
            self.settings.planned_host_bytes, self.module.rank.ranks_on_node
        )

    def _make_room(self, checkpoints: int, what: str) -> bool:
        """Tell whether there is room for more checkpoints; ``on_disk_low=prune`` makes some.

        Collective.

        Raises:
            CheckpointError: There is none, and ``checkpoint.on_disk_low`` is not ``skip``.
        """
        # Rank 0 looks at the disk, and prunes where that is allowed.
        problem: str | None = None
        if self.module.rank.is_first:
            run, needed = self.settings.run, self._bytes * checkpoints
            free = shutil.disk_usage(run).free
            if free < needed and self.settings.on_disk_low is OnDiskLow.prune:
                removed = prune_checkpoints(run, self.settings.retention, self._busy(), limit=1)
                names = ", ".join(removed) or "nothing, only protected checkpoints are left"
                self.say(f"the disk is low: removed {names}")
                free = shutil.disk_usage(run).free
            if free < needed:
                problem = (
                    f"{what} need {format_bytes(needed)} more in {run}, where {format_bytes(free)}"
                    " are free"
                )

        # All ranks hear of it, and decide alike.
        problem = gather_objects(problem, self.module.rank)[0]
        if problem is None:
            return True
        if self.settings.on_disk_low is OnDiskLow.skip:
            self.say(f"warning: {problem}; left out (checkpoint.on_disk_low=skip)")
            return False
        raise CheckpointError(
            f"{problem}. Free space, or set a smaller train.save_total_limit or"
            " checkpoint.on_disk_low=prune or skip; the same command then resumes from the newest"
            " checkpoint"
        )


def _read_text(file: Path) -> str | None:
    return file.read_text().strip() if file.is_file() else None
