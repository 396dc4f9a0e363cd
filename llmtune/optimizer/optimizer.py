"""The interface of an optimizer, and the registry of optimizers.

ZeRO cuts the flattened parameters anywhere, so that an optimizer that works in every stage is
element-wise: what becomes of an element depends on its own gradient and states, and on the step.
One kernel serves every stage and placement, on the accelerator and on the host, so that falling
back to another rung changes no digit. One that looks at whole matrices has a :class:`MatrixRule`,
or states of other shapes (``state_shapes``) and no stage but 0.

An update rule computes in fp32. Master weights and states may be stored in fewer bytes
(:mod:`llmtune.optimizer.storage`); the engine converts them, a piece at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from llmtune.config.groups.optim import OptimConfig, Rounding
from llmtune.optimizer.storage import BF16, FP32, Storage
from llmtune.registry import Registry
from llmtune.storage.layout import MASTER_WEIGHT

if TYPE_CHECKING:
    import torch

    from llmtune.config.schema import Precision
    from llmtune.optimizer.update import Update

#: Bytes of what is computed: an update, and what an optimizer stores unless it says otherwise.
FP32_BYTES = 4

#: The state that holds what rounding took from the master weights: with it they have 16 bits more.
COMPENSATION = "compensation"

#: Elements that are converted to fp32 and updated at a time, by accelerator: as many as a CPU has
#: in its cache, and as keep a GPU busy.
CONVERTED_ELEMENTS = {"cpu": 2**16, "cuda": 2**22}

#: Bytes of a whole matrix whose direction is sought, per element: its gradient in fp32, four copies
#: in bf16 (itself, and what an iteration makes; its square is at most as large), and the direction.
_MATRIX_BYTES = 4 + 4 * 2 + 4

#: The keys of ``optim`` that say how numbers are stored, and are no settings of an update.
_OF_STORAGE = ("rounding",)

Shape = tuple[int, ...]
"""Elements along each dimension of a tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixRule:
    """The part of an optimizer that updates matrices of layers as a whole.

    ZeRO cuts matrices anywhere. The engine puts the pieces of one together on one rank, and sends
    the direction of its step back (:mod:`llmtune.engine.optimizers.matrix_optimizer`). All other
    parameters are updated element by element.
    """

    title: str
    """Its name for people, beside that of the rule for all others."""
    states: tuple[str, ...]
    """Names of its fp32 tensors, each of the parameter's shape, in torch's state and in files."""
    blend: Callable[[Update], None]
    """Updates the states element by element, and makes the gradients what ``direct`` gets."""
    direct: Callable[[torch.Tensor], torch.Tensor]
    """Returns the direction of a step, which the learning rate multiplies.

    Both are fp32, of shape (matrices, rows, columns).
    """
    flops: Callable[[int, int], float]
    """Returns the operations of ``direct``, in bf16, for a matrix of so many rows and columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """An optimizer, as plan, engine, checkpoints and card see it."""

    name: str
    """Its value of ``optim.kind``."""
    title: str
    """Its name for people, and as ``type`` in DeepSpeed's configuration."""
    states: tuple[str, ...]
    """Names of its tensors in torch's state and in files.

    Each has the parameter's shape, unless ``state_shapes`` says otherwise.
    """
    state_shapes: Callable[[Shape], Mapping[str, Shape]] | None = None
    """Returns the names of a parameter's states with their shapes, given the parameter's.

    With it, ``update`` gets whole parameters, one at a time.
    """
    storages: Mapping[str, Storage] = field(default_factory=dict)
    """Formats of the states that are not fp32, by name."""
    master: Storage = FP32
    """Format of the master weights: fp32, or bf16, which is the weights' own dtype."""
    rounding: Rounding | None = None
    """Rounding of an update to bf16; None where master weights and states are fp32."""
    is_paged: bool = False
    """Its states in 8 bits are in memory that CUDA's driver moves to the host when a GPU is full.

    The plan counts them as the GPU's all the same: what is moved in each step costs its speed.
    """
    variant: Callable[[Optimizer, OptimConfig], Optimizer] | None = None
    """Returns the optimizer with settings that change what it stores."""
    stages: tuple[int, ...] = (0, 1, 2, 3)
    """ZeRO stages in which it works."""
    stages_reason: str = ""
    """The reason why it does not work in the others."""
    reads: tuple[str, ...] = ("betas", "eps", "weight_decay")
    """The keys of ``optim`` that it reads beside the learning rate."""
    update: Callable[[Update], None] | None = None
    """Make one step; None for an optimizer that DeepSpeed builds by its ``title``."""
    matrix: MatrixRule | None = None
    """The rule for matrices of layers; None where they are updated as all other parameters."""
    states_per_parameter: float | None = None
    """State elements per trained parameter, of the model that is planned.

    None where every parameter has all ``states``, and before there is a model.
    """
    whole_numel: int = 0
    """Elements of the largest parameter that is updated as a whole, of that model."""
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
        if len({*self.all_states, *reserved}) != len(self.all_states) + len(reserved):
            raise ValueError(
                f"states of {self.name}: {', '.join(self.states)}; each needs a name of its own,"
                f" and neither {MASTER_WEIGHT} nor step"
            )
        if (self.update is None) == (self.built_with is None):
            raise ValueError(f"{self.name} needs either update or built_with")
        if self.matrix is not None and (self.update is None or self.converts):
            raise ValueError(f"{self.name} needs update and fp32 states beside its matrix rule")
        if self.state_shapes is not None and (
            self.update is None or self.converts or self.stages != (0,)
        ):
            raise ValueError(
                f"{self.name} needs update, fp32 states and stages=(0,) beside state_shapes: in the"
                " other stages parameters have no shape"
            )
        if self.is_paged and not any(storage.in_blocks for storage in self.storages.values()):
            raise ValueError(f"{self.name} pages states in 8 bits, and has none")
        if self.converts != (self.rounding is not None) or (self.converts and self.update is None):
            raise ValueError(
                f"{self.name} needs update and rounding where it stores fewer bytes than fp32"
            )

    @property
    def converts(self) -> bool:
        """Tell whether anything is stored in fewer bytes than the update computes with."""
        return self.master is not FP32 or any(
            storage is not FP32 for storage in self.storages.values()
        )

    def storage(self, name: str) -> Storage:
        """Return how a state is stored, or the master weights."""
        return self.master if name == MASTER_WEIGHT else self.storages.get(name, FP32)

    @property
    def state_bytes(self) -> float:
        """Bytes of its states per trained parameter; at most, before there is a model."""
        if self.states_per_parameter is not None:
            return FP32_BYTES * self.states_per_parameter
        return sum(self.storage(name).element_bytes for name in self.states)

    def shapes_of(self, shape: Shape) -> Mapping[str, Shape]:
        """Return the states of a parameter that is updated by ``update``, with their shapes."""
        if self.state_shapes is not None:
            return self.state_shapes(shape)
        return dict.fromkeys(self.states, shape)

    @property
    def all_states(self) -> tuple[str, ...]:
        """Return the names of all its states, with those of matrices."""
        return (*self.states, *(self.matrix.states if self.matrix is not None else ()))

    @property
    def master_bytes(self) -> int:
        """Bytes of a master weight, and of its gradient in a step."""
        return int(self.master.element_bytes)

    @property
    def master_and_state_bytes(self) -> float:
        """Bytes of master weight and states per trained parameter."""
        return self.master_bytes + self.state_bytes

    def update_bytes(self, accelerator: str) -> int:
        """Bytes of a step's own tensors: numbers converted to fp32, random bits."""
        if not self.converts:
            per_element = FP32_BYTES if self.matrix is None else _MATRIX_BYTES
            return per_element * self.whole_numel
        # Weight, gradient, states, their denominator, and one that is being rounded; the bits are
        # 16 of each element, made from words of 64, and widened to 32.
        per_element = FP32_BYTES * (4 + len(self.states)) + 10
        return per_element * CONVERTED_ELEMENTS[accelerator]

    @property
    def swap_buffers(self) -> int:
        """Buffers for a sub-group on NVMe: master weights, states and gradients.

        DeepSpeed 0.19.8 takes as many in ``swap_tensor/partitioned_optimizer_swapper.py:
        swap_in_optimizer_state``.
        """
        return 2 + len(self.states)

    def settings(self, optim: OptimConfig, learning_rate: float) -> dict[str, Any]:
        """Return its settings as torch's optimizers spell them."""
        keys = [key for key in self.reads if key not in _OF_STORAGE]
        return {"lr": learning_rate, **{key: copy(getattr(optim, key)) for key in keys}}

    def to_deepspeed(self, optim: OptimConfig, learning_rate: float) -> dict[str, Any]:
        """Return its keys of DeepSpeed's configuration, which are those of every placement.

        DeepSpeed 0.19.8 refuses an optimizer that it does not build itself unless it is told
        otherwise (``runtime/engine.py``: ``_configure_optimizer`` where ZeRO offloads it, and
        ``_do_optimizer_sanity_check``).
        """
        settings = self.settings(optim, learning_rate)
        if self.built_with is not None:
            return {"optimizer": {"type": self.title, "params": {**settings, **self.built_with}}}
        keys: dict[str, Any] = {
            "optimizer": {"type": self.title, "params": settings},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        if self.master is BF16:
            keys["bf16"] = {"bf16_master_weights_and_grads": True}
        return keys

    def find_problems(self, optim: OptimConfig, precision: Precision) -> list[str]:
        """Find keys of ``optim`` that would have no effect, and a precision that is not its own."""
        defaults = OptimConfig()
        problems = [
            f"optim.{key}={_plain(getattr(optim, key))}: {self.title} does not read it; leave it"
            " out"
            for key in ("momentum", "betas", "eps", "weight_decay", *_OF_STORAGE)
            if key not in self.reads and getattr(optim, key) != getattr(defaults, key)
        ]
        if self.master is BF16 and precision.value != "bf16":
            problems.append(
                f"optim={self.name} with precision={precision.value}: its master weights are the"
                " model's own weights in bf16; take precision=bf16, or optim=adamw"
            )
        return problems

    def find_obstacle(self, stage: int, optimizer_device: str) -> str | None:
        """Say why it cannot train in a ZeRO stage, or with its states on a device.

        Args:
            optimizer_device: ``none`` (the accelerator), ``cpu`` or ``nvme``.
        """
        if stage not in self.stages:
            return f"{self.title} in ZeRO {stage}: {self.stages_reason}"
        if optimizer_device == "nvme" and self.matrix is not None:
            return (
                f"{self.matrix.title} on NVMe: DeepSpeed swaps the same number of states for every"
                " parameter, and matrices have fewer"
            )
        if optimizer_device == "nvme" and self.converts:
            return (
                f"{self.title} on NVMe: DeepSpeed swaps master weights, states and gradients"
                " through buffers of one dtype and length, and llmtune aligns them for fp32 alone"
            )
        return None

    def describe(self, settings: Mapping[str, Any]) -> str:
        """Describe it in a phrase, for the page before step 1 and the card.

        Args:
            settings: Values of ``optim`` by key. ``eps`` is left out.
        """
        values = {key: _plain(value) for key, value in settings.items()}
        described = [
            f"{key.replace('_', ' ')} {values.get(key)}" for key in self.reads if key != "eps"
        ]
        title = self.title
        if self.matrix is not None:
            title = f"{self.matrix.title} for matrices of layers, {title} for all others"
        return ", ".join([title, *described])

    def describe_storage(self) -> str:
        """Describe in which numbers master weights and states are stored."""
        if not self.converts:
            return "fp32 master weights and optimizer states"
        formats = dict.fromkeys(self.storage(name).name for name in self.states)
        paged = ", which go to the host where a GPU is full" if self.is_paged else ""
        stored = " and ".join(formats)
        return f"{self.master.name} master weights; optimizer states in {stored}{paged}"


def _plain(value: Any) -> Any:
    """Return a setting as it is typed."""
    return getattr(value, "value", value)


OPTIMIZERS: Registry[Optimizer] = Registry(
    "optim.kind", "llmtune.optimizer.kinds", interface=Optimizer
)


def find_optimizer(optim: OptimConfig) -> Optimizer:
    """Return the optimizer that is configured, with the settings that change what it stores.

    Raises:
        ConfigError: There is none of this name.
    """
    optimizer = OPTIMIZERS.find(optim.kind)
    return optimizer if optimizer.variant is None else optimizer.variant(optimizer, optim)
