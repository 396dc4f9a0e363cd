"""The frozen plan of a run: ranks, placement, batches, memory and DeepSpeed's dictionary.

It is derived from the config and the hardware before any rank starts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.deepspeed_config import with_nvme_path
from llmtune.plan.devices.hardware import Hardware
from llmtune.plan.memory.memory_plan import MemoryPlan
from llmtune.plan.memory.placement import Placement
from llmtune.plan.memory.recomputed_layers import RecomputedLayers
from llmtune.plan.memory.shapes import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every derived value of a run except the number of steps, which depends on the data."""

    world_size: int
    hardware: Hardware
    shape: ModelShape
    placement: Placement
    batch: BatchPlan
    memory: MemoryPlan
    tokens_per_second: float
    """Predicted, for full rows."""
    recomputed: RecomputedLayers
    attn_implementation: str
    learning_rate: float
    deepspeed: dict[str, Any]
    notes: tuple[str, ...]
    """Origins of the derived values, for the page before step 1."""

    @property
    def gradient_checkpointing(self) -> bool:
        """Tell whether any layer is computed again in the backward pass."""
        return self.recomputed.count > 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for ``plan.json`` and for the ranks."""
        values = asdict(self)
        # Hundreds of tensors that only planning needs.
        del values["shape"]["tensors"]
        return values


def with_nvme(plan: Plan, folder: str) -> Plan:
    """Return the plan with the folder of the swap files."""
    return replace(plan, deepspeed=with_nvme_path(plan.deepspeed, folder))
