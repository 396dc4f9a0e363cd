"""The fully resolved run that all ranks execute; made once, by the supervisor or by rank 0."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmtune.config.groups.train import NO, strategy_name
from llmtune.config.schema import Config
from llmtune.config.stored import from_plain, to_plain
from llmtune.plan.plan import Plan
from llmtune.plan.prepared_data import PreparedData
from llmtune.plan.steps import StepsPlan
from llmtune.storage import plain_fields
from llmtune.task.labels import Labels
from llmtune.task.task import find_task


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """A fully resolved run."""

    config: Config
    plan: Plan
    steps: StepsPlan
    data: PreparedData
    labels: Labels
    run_folder: Path
    run_name: str
    model_folder: Path
    resume_from: Path | None
    """A complete checkpoint, or None for a new run."""
    run_id: str
    """The id that marks this run's folder at ``checkpoint.mirror``."""

    @property
    def evaluates(self) -> bool:
        """Tell whether there are rows to evaluate on, and ``train.eval_strategy`` is not ``no``."""
        return self.data.eval is not None and strategy_name(self.config.train.eval_strategy) != NO

    @property
    def eval_batch_size(self) -> int:
        """Return the rows per evaluation batch: as set, or the planned micro-batch size."""
        rows = self.config.train.per_device_eval_batch_size
        return rows if isinstance(rows, int) else self.plan.batch.micro_batch_size

    @property
    def row_length(self) -> int:
        """Return the tokens of a training row, on average."""
        train = self.data.train
        return max(1, train.tokens // max(1, train.rows))

    @property
    def eval_max_rows(self) -> int | None:
        """Return the rows per evaluation during training; None for all."""
        rows = self.config.train.eval_max_rows
        if isinstance(rows, str):
            return 256 if find_task(self.config.model.task).generates else None
        return rows

    @property
    def base_name(self) -> str:
        """Return the name of an adapter's base: the hub id, or the folder of the weights."""
        name = self.config.model.name_or_path
        return name if "models--" in str(self.model_folder) else str(self.model_folder)

    def to_json(self) -> str:
        """Serialize the request, for a file or a broadcast."""
        return json.dumps(
            {
                "config": to_plain(self.config),
                "plan": self.plan.to_dict(),
                "steps": asdict(self.steps),
                "data": self.data.to_dict(),
                "labels": self.labels.to_dict(),
                "run_folder": str(self.run_folder),
                "run_name": self.run_name,
                "model_folder": str(self.model_folder),
                "resume_from": str(self.resume_from) if self.resume_from else None,
                "run_id": self.run_id,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> RunRequest:
        """Build the request from what :meth:`to_json` returned."""
        values: dict[str, Any] = json.loads(text)
        return cls(
            config=from_plain(values["config"]),
            plan=plain_fields.from_plain(Plan, values["plan"]),
            steps=plain_fields.from_plain(StepsPlan, values["steps"]),
            data=plain_fields.from_plain(PreparedData, values["data"]),
            labels=Labels.from_dict(values["labels"]),
            run_folder=Path(values["run_folder"]),
            run_name=values["run_name"],
            model_folder=Path(values["model_folder"]),
            resume_from=Path(values["resume_from"]) if values["resume_from"] else None,
            run_id=values["run_id"],
        )
