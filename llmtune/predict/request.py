"""The request to the processes of a prediction, as a file that each of them reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.config.stored import from_plain, to_plain
from llmtune.run.target import Target
from llmtune.task.labels import Labels


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictRequest:
    """A prediction whose rows are prepared."""

    target: Target
    """Its configuration has the settings of ``predict``."""
    folder: Path
    """The job's folder."""

    def to_json(self) -> str:
        """Serialize the request."""
        target = self.target
        return json.dumps(
            {
                "config": to_plain(target.config),
                "model_folder": str(target.model_folder),
                "adapter": str(target.adapter) if target.adapter else None,
                "run": str(target.run) if target.run else None,
                "base_name": target.base_name,
                "labels": target.labels.to_dict(),
                "code_asked_by": target.code_asked_by,
                "folder": str(self.folder),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> PredictRequest:
        """Build the request from what :meth:`to_json` returned."""
        values: dict[str, Any] = json.loads(text)
        target = Target(
            config=from_plain(values["config"]),
            model_folder=Path(values["model_folder"]),
            adapter=Path(values["adapter"]) if values["adapter"] else None,
            run=Path(values["run"]) if values["run"] else None,
            base_name=values["base_name"],
            labels=Labels.from_dict(values["labels"]),
            code_asked_by=values["code_asked_by"],
        )
        return cls(target=target, folder=Path(values["folder"]))
