"""``--schema``: the configuration as a JSON Schema, with the names of all registered variants."""

from __future__ import annotations

import json
from typing import Any

from llmtune.config.reference.json_schema import Variants, make_json_schema
from llmtune.data.formats.format import FORMATS as ROW_FORMATS
from llmtune.export.formats.format import FORMATS as EXPORT_FORMATS
from llmtune.optimizer.optimizer import OPTIMIZERS
from llmtune.registry import Registry
from llmtune.task.task import TASKS
from llmtune.track.service import SERVICES
from llmtune.train.schedule import SCHEDULES
from llmtune.tuner.tuner import TUNERS

_REGISTRIES: tuple[Registry[Any], ...] = (
    *(ROW_FORMATS, EXPORT_FORMATS, OPTIMIZERS, TASKS, SERVICES, SCHEDULES, TUNERS),
)


def list_variants() -> Variants:
    """Return the values of each key that takes a registered variant; plug-ins are among them."""
    return {registry.key: registry.names() for registry in _REGISTRIES}


def to_text() -> str:
    """Return the JSON Schema as ``--schema`` prints it."""
    return json.dumps(make_json_schema(list_variants()), indent=2, ensure_ascii=False)
