"""The training module: a model in DeepSpeed's engine, trained one optimizer step at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self

import torch

from llmtune.engine.deepspeed_fixes import (
    allow_bf16_masters,
    grow_loss_scale_behind_step,
    keep_norm_precision,
    keep_overflow_on_device,
    missing_loss_scale,
    norms_of,
    share_weights_with_masters,
    step_in_few_kernels,
    undo_stage0_dummy_step,
)
from llmtune.engine.distributed import Rank, all_reduce_sum
from llmtune.engine.nvme_swap import check_swapped_offsets
from llmtune.engine.optimizers.converting_optimizer import ConvertingOptimizer
from llmtune.engine.optimizers.elementwise_optimizer import ElementwiseOptimizer
from llmtune.engine.optimizers.matrix_optimizer import MatrixOptimizer
from llmtune.engine.optimizers.whole_optimizer import WholeOptimizer
from llmtune.engine.phases.gather_time import time_gathers
from llmtune.engine.phases.phase_clock import REST
from llmtune.engine.state_slices import list_slices
from llmtune.optimizer.optimizer import Optimizer
from llmtune.optimizer.param_groups import DEFAULT_GROUP, RATE_FACTOR, GroupOf, plain_name
from llmtune.plan.memory.parameter_groups import parameter_groups
from llmtune.plan.memory.placement import Placement, read_placement
from llmtune.plan.memory.shapes import TensorShape
from llmtune.task.objective import Objective
from llmtune.task.targets import Targets


class MicroBatch(Protocol):
    """The input of a forward pass: a ``Batch`` of ``data/``, which ``engine/`` may not import."""

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Arguments of the model's forward."""

    @property
    def targets(self) -> Targets:
        """Return the targets, for the loss function."""

    def to(self, device: torch.device | str) -> Self:
        """Copy it to another device."""

    def split(self) -> list[Self]:
        """Split it into a batch per row."""

    def split_logits(self, logits: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split its logits by rows, too."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of one evaluation."""

    loss: float
    """Mean over all ranks' batches."""
    observed: dict[str, torch.Tensor]
    """Values of this rank's batches that metrics need, joined, on the host."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of one optimizer step."""

    loss: float
    """Mean over the step's targets, over all ranks and micro-batches."""
    grad_norm: float
    """Global 2-norm of the gradient, before clipping."""
    applied: bool
    """False where the step was skipped because a gradient was not finite."""


def zero_init(deepspeed_config: dict[str, Any]) -> AbstractContextManager[Any]:
    """Make a context in which ZeRO 3 keeps only this rank's slice of every new parameter.

    DeepSpeed would broadcast every parameter from rank 0 before partitioning it: 141 GB of
    uninitialized memory for a 70B model. The weights are read slice by slice afterwards.
    """
    import deepspeed

    class Init(deepspeed.zero.Init):  # type: ignore[misc]
        """DeepSpeed's ``zero.Init`` without the broadcast."""

        def _zero_init_param(self, param: Any) -> None:
            self._convert_to_deepspeed_param(param)
            param.partition()

    context: AbstractContextManager[Any] = Init(config_dict_or_path=deepspeed_config)
    return context


class TrainModule:
    """Runs the forward pass, backward pass, optimizer step and evaluation."""

    def __init__(
        self,
        model: Any,
        deepspeed_config: dict[str, Any],
        rank: Rank,
        objective: Objective,
        optimizer: Optimizer,
        seed: int = 0,
        group_of: GroupOf = lambda _: DEFAULT_GROUP,
    ):
        """Build DeepSpeed's engine around a model.

        Args:
            objective: Finds the losses of batches.
            seed: Of the random bits with which an optimizer rounds.
            group_of: Finds the settings of a parameter that are not the optimizer's.
        """
        import deepspeed

        self.optimizer = optimizer

        self.rank = rank
        self.objective = objective
        self.placement = read_placement(deepspeed_config)
        self.zero_stage = self.placement.zero_stage
        self.config = deepspeed_config
        # DeepSpeed writes into the dictionary it is given.
        copy = {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in deepspeed_config.items()
        }
        settings = dict(copy["optimizer"]["params"])
        copy["optimizer"]["params"] = settings
        groups = group_parameters(model, self.placement, rank.world_size, settings, group_of)
        self.matrices = frozenset(
            name for name, _ in model.named_parameters() if group_of(plain_name(name)).is_matrices
        )
        own = make_optimizer(groups, optimizer, settings, seed, rank)
        if own is not None:
            del copy["optimizer"]
        with share_weights_with_masters(), allow_bf16_masters():
            self.engine, *_ = deepspeed.initialize(
                model=model, model_parameters=groups, optimizer=own, config=copy
            )
        if isinstance(own, ConvertingOptimizer):
            own.place(list_slices(self.engine.optimizer, self.model, self.zero_stage, rank.rank))
        if isinstance(own, MatrixOptimizer):
            own.place(self.engine.optimizer, self.model, self.zero_stage)
        if self.zero_stage == 0:
            undo_stage0_dummy_step(self.engine.optimizer)
            step_in_few_kernels(self.engine.optimizer)
        if self.zero_stage == 3:
            time_gathers(self.engine.optimizer, rank.phases.clock)
        keep_norm_precision(self.engine.optimizer, self.zero_stage)
        keep_overflow_on_device(self.engine.optimizer)
        grow_loss_scale_behind_step(self.engine.optimizer)
        if self.placement.optimizer == "nvme":
            check_swapped_offsets(self.engine.optimizer)
        objective.install()

    @property
    def model(self) -> Any:
        """The model inside the engine."""
        return self.engine.module

    @property
    def torch_optimizer(self) -> Any:
        """The optimizer of torch inside DeepSpeed's wrapper."""
        return getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)

    def train_step(
        self,
        micro_batches: Sequence[MicroBatch],
        loss_weight: float,
        learning_rate: float,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> StepResult | None:
        """Run one optimizer step over all micro-batches.

        A step whose gradient is not finite changes nothing.

        Args:
            loss_weight: Trained tokens or rows of the step, over all ranks. The loss is divided by
                them once, so that accumulation and ranks change nothing. DeepSpeed averages
                gradients over ranks, hence the factor ``world_size``.
            interrupted: Called on every rank between micro-batches, with the same result on all.
                True abandons the step: None is returned, and the state is that of the step before.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate * group.get(RATE_FACTOR, 1.0)
        scale = self.rank.world_size / (loss_weight or 1)
        total = torch.zeros((), dtype=torch.float64, device=self.rank.device)
        norm: float | None = None
        self.engine.train()
        phases = self.rank.phases

        # ``engine.step`` only counts until the last micro-batch, and then steps.
        for index, batch in enumerate(micro_batches):
            if index and interrupted():
                return None
            # DeepSpeed counts micro-batches since the start, of which every step must have as many
            # (``engine.py: is_gradient_accumulation_boundary``). A growing batch has not.
            is_last = index == len(micro_batches) - 1
            self.engine.set_gradient_accumulation_boundary(is_last)
            place = f"micro-batch {index + 1} of {len(micro_batches)}"
            phases.enter("forward", place)
            loss = self._train_loss(batch)
            phases.enter("backward", place)
            self.engine.backward(
                loss * (scale * missing_loss_scale(self.engine.optimizer)), scale_wrt_gas=False
            )
            total += loss.detach()
            if is_last:
                norm = self._unpartitioned_grad_norm()
            phases.enter("step")
            if norm is None or math.isfinite(norm) or hasattr(self.engine.optimizer, "overflow"):
                self.engine.step()
            else:
                self._leave_step_out()
        phases.clock.enter(REST)

        # The norm, the mean loss of all ranks, and whether the step was applied.
        reported = self.engine.get_global_grad_norm()
        if norm is None:
            norm = 0.0 if reported is None else float(reported)
        (summed,) = all_reduce_sum([float(total)], self.rank)
        # The loss is known, and so are the times of what led to it.
        phases.clock.read()
        applied = bool(self.engine.was_step_applied()) and math.isfinite(norm)
        return StepResult(summed / (loss_weight or 1), norm, applied)

    def evaluate(
        self,
        batches: Iterable[MicroBatch],
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Evaluation | None:
        """Take the mean loss of all ranks' batches, and what metrics need; None if interrupted.

        Args:
            interrupted: Called on every rank before each batch, with the same result on all.
        """
        self.rank.phases.enter("evaluate")
        self.engine.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.rank.device)
        weight = 0.0
        pieces: list[dict[str, torch.Tensor]] = []
        with torch.no_grad():
            for batch in batches:
                if interrupted():
                    return None
                batch = batch.to(self.rank.device)
                loss, observed = self.objective.judge(self._forward_pass(batch), batch.targets)
                total += loss
                weight += batch.targets.weight
                pieces.append(observed)
                self.rank.phases.beat()
        self.engine.train()
        summed, weights = all_reduce_sum([float(total), weight], self.rank)
        names = pieces[0] if pieces else ()
        joined = {name: torch.cat([piece[name] for piece in pieces]).cpu() for name in names}
        return Evaluation(summed / (weights or 1), joined)

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """Compute a batch's logits, on the host, without gradients and without dropout.

        Collective under ZeRO 3.
        """
        self.engine.eval()
        with torch.no_grad():
            logits: torch.Tensor = self.engine(
                **batch.to(self.rank.device).inputs, use_cache=False
            ).logits
        self.engine.train()
        return logits.cpu()

    def row_losses(self, batches: Iterable[MicroBatch]) -> list[list[float]]:
        """Compute the summed loss of each row of each batch, without gradients and dropout.

        Collective under ZeRO 3.
        """
        self.engine.eval()
        losses: list[list[float]] = []
        with torch.no_grad():
            for batch in batches:
                logits = self.engine(**batch.to(self.rank.device).inputs, use_cache=False).logits
                of_rows: list[float] = []
                of_batch = zip(batch.split_logits(logits), batch.split(), strict=True)
                for row_logits, row in of_batch:
                    targets = row.to(row_logits.device).targets
                    of_rows.append(float(self.objective.of_logits(row_logits, targets)))
                losses.append(of_rows)
        self.engine.train()
        return losses

    def _train_loss(self, batch: MicroBatch) -> torch.Tensor:
        batch = batch.to(self.rank.device)
        return self.objective.train(self._forward_pass(batch), batch.targets)

    def _forward_pass(self, batch: MicroBatch) -> Callable[[], Any]:
        return partial(self.engine, **batch.inputs, use_cache=False)

    def _leave_step_out(self) -> None:
        """Count the micro-batch without a step.

        This is for fp32 without ZeRO, where no wrapper of DeepSpeed checks gradients.
        """
        self.engine.set_gradient_accumulation_boundary(False)
        self.engine.step()
        self.engine.zero_grad()

    def _unpartitioned_grad_norm(self) -> float | None:
        """Compute the norm for fp32 without ZeRO, where no wrapper of DeepSpeed has one."""
        if self.zero_stage > 0 or hasattr(self.engine.optimizer, "overflow"):
            return None
        norms = norms_of([p.grad for p in self.model.parameters() if p.grad is not None])
        return float(torch.linalg.vector_norm(torch.stack(list(norms)))) if norms else 0.0


def make_optimizer(
    groups: list[dict[str, Any]],
    optimizer: Optimizer,
    settings: dict[str, Any],
    seed: int,
    rank: Rank,
) -> ElementwiseOptimizer | ConvertingOptimizer | None:
    """Make the optimizer of torch for groups of parameters; None where DeepSpeed builds it.

    Args:
        settings: Those of groups that have none of their own.
        seed: Of the random bits with which it rounds.
    """
    if optimizer.update is None:
        return None
    if optimizer.converts:
        return ConvertingOptimizer(groups, optimizer, settings, seed)
    if optimizer.matrix is not None:
        return MatrixOptimizer(groups, optimizer, settings, rank)
    if optimizer.state_shapes is not None:
        return WholeOptimizer(groups, optimizer, settings)
    return ElementwiseOptimizer(groups, optimizer, settings)


def group_parameters(
    model: Any,
    placement: Placement,
    world_size: int,
    settings: Mapping[str, Any],
    group_of: GroupOf,
) -> list[dict[str, Any]]:
    """Group the model's parameters as the plan does.

    See :func:`llmtune.plan.memory.parameter_groups.parameter_groups`.

    Args:
        settings: The optimizer's, which a group has unless it has its own.
    """
    by_name = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    own = {name: group_of(plain_name(name)) for name in by_name}
    shapes = [
        TensorShape(
            name=name,
            shape=tuple(getattr(p, "ds_shape", p.shape)),
            trained=True,
            group=own[name].key,
        )
        for name, p in by_name.items()
    ]
    groups: list[dict[str, Any]] = []
    for group in parameter_groups(shapes, placement, world_size):
        first = group[0]
        groups.append(
            {
                "params": [by_name[tensor.name] for tensor in group],
                **own[first.name].to_settings(settings, first.vector),
            }
        )
    return groups
