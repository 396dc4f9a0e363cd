"""``plan.json`` of a run folder: everything that was derived for the run, and what became of it.

Its keys are a contract: programs outside llmtune read them. A file of an earlier version may lack
some; what it does not say is None, empty or 0 here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.devices.hardware import Hardware
from llmtune.plan.memory.memory_plan import MemoryPlan
from llmtune.plan.memory.placement import Placement
from llmtune.plan.memory.recomputed_layers import RecomputedLayers
from llmtune.plan.memory.shapes import ModelShape
from llmtune.plan.prepared_data import PreparedData
from llmtune.plan.steps import StepsPlan
from llmtune.security.redaction import redact_values
from llmtune.storage.plain_fields import from_plain
from llmtune.storage.plain_json import parse_json

if TYPE_CHECKING:
    from llmtune.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class BeganFrom:
    """The checkpoint that a run was told to begin from."""

    origin: str
    """Its folder or URL, without secrets."""
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFailure:
    """An attempt that ran out of memory."""

    candidate: dict[str, Any]
    """The placement and batch of the attempt."""
    conditions: dict[str, Any]
    """The hardware and limits under which this failure counts for a later start."""
    time: float
    """Seconds since 1970."""
    rank: int
    phase: str
    step: int
    peak_bytes: int
    pool: str
    """``device`` or ``host``."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The contents of ``plan.json``."""

    world_size: int | None = None
    hardware: Hardware | None = None
    shape: ModelShape | None = None
    """The model's shape, without its tensors."""
    placement: Placement | None = None
    batch: BatchPlan | None = None
    memory: MemoryPlan | None = None
    tokens_per_second: float | None = None
    """Predicted, for full rows."""
    gradient_checkpointing: bool | None = None
    """Any layer is computed again in the backward pass."""
    recomputed: RecomputedLayers | None = None
    """Their number; None in a run of an earlier version, whose layers were all the same."""
    attn_implementation: str | None = None
    learning_rate: float | None = None
    deepspeed: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """Origins of the derived values."""
    steps: StepsPlan | None = None
    data: PreparedData | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    """Values of :class:`llmtune.task.labels.Labels`; empty for language modeling."""
    model_folder: Path | None = None
    run_name: str | None = None
    """The name by which a mirror knows the run."""
    run_id: str | None = None
    """Id that marks the run's folder at a mirror; None in a run of an earlier version."""
    began_from: BeganFrom | None = None
    """None for a run that began without a checkpoint."""
    history: tuple[MemoryFailure, ...] = ()
    """Attempts that ran out of memory, oldest first."""

    @classmethod
    def of_plan(cls, plan: Plan, **rest: Any) -> RunRecord:
        """Make the record of a plan, with the fields that are not the plan's."""
        values = {item.name: getattr(plan, item.name) for item in fields(plan)}
        # Hundreds of tensors that only planning needs.
        shape = replace(plan.shape, tensors=())
        values |= {"shape": shape, "gradient_checkpointing": plan.gradient_checkpointing}
        return cls(**values, **rest)

    def to_json(self) -> str:
        """Return the text of the file, without secrets."""
        values = asdict(self)
        if self.shape is not None:
            del values["shape"]["tensors"]
        values["data"] = None if self.data is None else self.data.to_dict()
        values["model_folder"] = None if self.model_folder is None else str(self.model_folder)
        return json.dumps(redact_values(values), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> RunRecord:
        """Read the text of a file; what it lacks, or holds in another form, is empty.

        Raises:
            ValueError: It is no JSON, as a crash of the machine may leave it.
        """
        return from_plain(cls, parse_json(text))
