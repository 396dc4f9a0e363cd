"""Collect what a run's files, its adapter and its base say about a model.

What is not known is left out.
"""

import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmtune.errors import ExportError
from llmtune.export.request import ExportRequest, is_hub_id
from llmtune.plan.run_record import RunRecord
from llmtune.security.redaction import redact_values
from llmtune.security.trust import read_foreign
from llmtune.storage import layout
from llmtune.storage.plain_fields import from_plain
from llmtune.storage.plain_json import find_value, parse_json, parse_lines

_DATA_FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|txt|gz|zst|bz2|xz)$", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The known facts about how a model was made, without secrets.

    Paths and clocks are not taken from it into the card.
    """

    config: dict[str, Any] = field(default_factory=dict)
    plan: RunRecord = field(default_factory=RunRecord)
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Lines up to the step that is exported."""
    adapter: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    best: dict[str, Any] = field(default_factory=dict)
    """``metric``, ``value`` and ``step``, where the model is the best of its run."""
    last_step: int | None = None
    """The last step of that run."""

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of the run's configuration by its dotted key."""
        return find_value(self.config, key, default)

    @property
    def tuner(self) -> str | None:
        """Return the tuner's name; None where nothing was trained, or it is not known."""
        if self.config:
            return str(self.get("tuner.kind"))
        return "lora" if self.adapter else None

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Return the evaluation lines with a loss or another metric."""
        return [record for record in self.metrics if any(key.startswith("eval_") for key in record)]


def read_facts(request: ExportRequest) -> Facts:
    """Read what there is; a file that is missing or broken is as good as none."""
    trained = request.adapter or (request.base if request.run is not None else None)
    adapter = (
        read_json(request.adapter / layout.ADAPTER_CONFIG) if request.adapter is not None else {}
    )
    if request.run is None:
        return Facts(adapter=redact_values(adapter))
    # A checkpoint has the configuration and the metrics of the time when it was saved.
    places = [place for place in (trained, request.run) if place is not None]
    step = _find_step(trained) if trained is not None else None
    result = read_json(trained / layout.MANIFEST) if trained is not None else {}
    best, last_step = result.get("best"), result.get("last_step")
    metrics = next(
        (lines for place in places if (lines := _read_lines(place / layout.METRICS))), []
    )

    # Lines up to the exported step, which may be the run's last one.
    if step is not None:
        metrics = [record for record in metrics if record["step"] <= step]
    if step is None and metrics:
        step = metrics[-1]["step"]
    return Facts(
        config=redact_values(
            next((found for place in places if (found := _read_yaml(place / layout.CONFIG))), {})
        ),
        plan=from_plain(RunRecord, redact_values(read_json(request.run / layout.PLAN))),
        environment=redact_values(read_json(request.run / layout.ENVIRONMENT)),
        metrics=metrics,
        adapter=redact_values(adapter),
        step=step,
        best=best if isinstance(best, dict) else {},
        last_step=last_step if isinstance(last_step, int) else None,
    )


def list_sources(value: Any) -> list[str]:
    """List what ``data.train`` or ``data.eval`` names.

    Folders of this machine, and what signs a URL, are left out.
    """
    if value is None:
        return []
    found = []
    for entry in value if isinstance(value, list) else [value]:
        path = str(entry.get("path", "")) if isinstance(entry, dict) else str(entry)
        if "://" in path:
            found.append(path.partition("?")[0].partition("#")[0])
        else:
            found.append(path if _is_hub_source(path) else path.rstrip("/").rpartition("/")[2])
    return found


def find_hub_datasets(facts: Facts) -> list[str]:
    """Find the data sets of the hub among the sources."""
    named = [
        name.partition("@")[0]
        for key in ("train", "eval")
        for name in list_sources(facts.get(f"data.{key}"))
    ]
    return sorted({name for name in named if _is_hub_source(name)})


def read_metrics_after(facts: Facts) -> dict[str, float]:
    """Return the held-out metrics of the step that is exported, without ``eval_``."""
    last = facts.evaluations[-1] if facts.evaluations else {}
    return {
        key.removeprefix("eval_"): float(value)
        for key, value in last.items()
        if key.startswith("eval_") and isinstance(value, int | float)
    }


def _is_hub_source(path: str) -> bool:
    return is_hub_id(path.partition("@")[0]) and not _DATA_FILE.search(path.partition("@")[0])


def _find_step(trained: Path) -> int | None:
    """Find the step that a folder of weights was written at."""
    step = layout.checkpoint_step(trained)
    if step is None:
        given = read_json(trained / layout.MANIFEST).get("step")
        step = given if isinstance(given, int) else None
    return step


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that anybody may have written; empty where it is missing, or is no object."""
    with contextlib.suppress(ExportError, ValueError):
        found = parse_json(read_foreign(path, ExportError))
        return found if isinstance(found, dict) else {}
    return {}


def _read_yaml(path: Path) -> dict[str, Any]:
    with contextlib.suppress(ExportError, ValueError, yaml.YAMLError):
        found = yaml.safe_load(read_foreign(path, ExportError))
        return found if isinstance(found, dict) else {}
    return {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a metrics file; skip a half-written one, as a crash leaves it."""
    with contextlib.suppress(ExportError, UnicodeDecodeError):
        lines = parse_lines(read_foreign(path, ExportError))
        return [line for line in lines if isinstance(line.get("step"), int)]
    return []
