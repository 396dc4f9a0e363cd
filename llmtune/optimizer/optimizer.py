"""The interface of an optimizer, and the registry of optimizers.

ZeRO cuts the flattened parameters anywhere, so that every optimizer here is element-wise: what
becomes of an element depends on its own gradient and states, and on the step. One kernel serves
every stage and placement, on the accelerator and on the host, so that falling back to another rung
changes no digit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from llmtune.config.groups.optim import OptimConfig
from llmtune.registry import Registry
from llmtune.storage.layout import MASTER_WEIGHT

if TYPE_CHECKING:
    import torch

#: Master weights, gradients of a step and states are fp32.
FP32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """One step of some parameters, or of pieces of them; the lists are of equal lengths."""

    parameters: list[torch.Tensor]
    """fp32, changed in place."""
    gradients: list[torch.Tensor]
    """fp32, after clipping."""
    states: Mapping[str, list[torch.Tensor]]
    """The optimizer's states by name, changed in place; zero before the first step."""
    step: int
    """Counted from 1; skipped steps are not counted."""
    settings: Mapping[str, Any]
    """``lr``, and the keys that the optimizer reads; ``weight_decay`` is 0 for vectors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """An optimizer, as plan, engine, checkpoints and card see it."""

    name: str
    """Its value of ``optim.kind``."""
    title: str
    """Its name for people, and as ``type`` in DeepSpeed's configuration."""
    states: tuple[str, ...]
    """Names of its fp32 tensors, each of the parameter's shape, in torch's state and in files."""
    reads: tuple[str, ...] = ("betas", "eps", "weight_decay")
    """The keys of ``optim`` that it reads beside the learning rate."""
    update: Callable[[Update], None] | None = None
    """Make one step; None for an optimizer that DeepSpeed builds by its ``title``."""
    built_with: Mapping[str, Any] | None = None
    """Further arguments with which DeepSpeed builds it, where it does."""
    kernel_bytes: int | None = None
    """Bytes that its kernels read and write per parameter and step.

    Without it, they are those of one kernel that reads every number once and writes what changes.
    """
    learning_rate_scale: float = 1.0
    """Factor of the learning rate that ``optim.learning_rate=auto`` takes for AdamW."""

    def __post_init__(self) -> None:
        known = {field.name for field in fields(OptimConfig)} - {"kind", "learning_rate"}
        if unknown := set(self.reads) - known:
            raise ValueError(f"{self.name} reads optim.{min(unknown)}, which is no key")
        reserved = {MASTER_WEIGHT, "step"}
        if len({*self.states, *reserved}) != len(self.states) + len(reserved):
            raise ValueError(
                f"states of {self.name}: {', '.join(self.states)}; each needs a name of its own,"
                f" and neither {MASTER_WEIGHT} nor step"
            )
        if (self.update is None) == (self.built_with is None):
            raise ValueError(f"{self.name} needs either update or built_with")

    @property
    def state_bytes(self) -> int:
        """Bytes of its states per trained parameter."""
        return FP32_BYTES * len(self.states)

    @property
    def master_and_state_bytes(self) -> int:
        """Bytes of master weight and states per trained parameter."""
        return FP32_BYTES + self.state_bytes

    @property
    def swap_buffers(self) -> int:
        """Buffers for a sub-group on NVMe: master weights, states and gradients.

        DeepSpeed 0.19.8 takes as many in ``swap_tensor/partitioned_optimizer_swapper.py:
        swap_in_optimizer_state``.
        """
        return 2 + len(self.states)

    def settings(self, optim: OptimConfig, learning_rate: float) -> dict[str, Any]:
        """Return its settings as torch's optimizers spell them."""
        return {"lr": learning_rate, **{key: copy(getattr(optim, key)) for key in self.reads}}

    def to_deepspeed(self, optim: OptimConfig, learning_rate: float) -> dict[str, Any]:
        """Return its keys of DeepSpeed's configuration, which are those of every placement.

        DeepSpeed 0.19.8 refuses an optimizer that it does not build itself unless it is told
        otherwise (``runtime/engine.py``: ``_configure_optimizer`` where ZeRO offloads it, and
        ``_do_optimizer_sanity_check``).
        """
        settings = self.settings(optim, learning_rate)
        if self.built_with is not None:
            return {"optimizer": {"type": self.title, "params": {**settings, **self.built_with}}}
        return {
            "optimizer": {"type": self.title, "params": settings},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }

    def find_problems(self, optim: OptimConfig) -> list[str]:
        """Find keys of ``optim`` that are set and would have no effect."""
        defaults = OptimConfig()
        return [
            f"optim.{key}={getattr(optim, key)}: {self.title} does not read it; leave it out"
            for key in ("betas", "eps", "weight_decay")
            if key not in self.reads and getattr(optim, key) != getattr(defaults, key)
        ]

    def describe(self, settings: Mapping[str, Any]) -> str:
        """Describe it in a phrase, for the page before step 1 and the card.

        Args:
            settings: Values of ``optim`` by key. ``eps`` is left out.
        """
        described = [
            f"{key.replace('_', ' ')} {settings.get(key)}" for key in self.reads if key != "eps"
        ]
        return ", ".join([self.title, *described])


OPTIMIZERS: Registry[Optimizer] = Registry(
    "optim.kind", "llmtune.optimizer.kinds", interface=Optimizer
)
