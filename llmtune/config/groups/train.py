"""The keys of ``train``: batches, the length of the run, evaluations and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class OnNan(Enum):
    """The reaction to a loss or a gradient that is not finite."""

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


#: Values of ``train.eval_strategy`` and ``train.save_strategy``.
STEPS, EPOCH, NO = "steps", "epoch", "no"


class BatchScheduleUnit(Enum):
    """The unit in which ``train.batch_schedule`` says where a size begins."""

    steps = "steps"
    tokens = "tokens"


class BatchScheduleLr(Enum):
    """The change of the peak learning rate with the batch size."""

    none = "none"
    linear = "linear"
    sqrt = "sqrt"


class Compile(Enum):
    """The parts of a model that torch compiles."""

    none = "none"
    layers = "layers"


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """Batches, length of the run, evaluation, saving."""

    global_batch_size: int | str = "auto"
    """Rows per optimizer step, over all ranks and micro-batches.

    ``auto`` is the product of the
    ranks and the next two keys where both are set; otherwise the smallest multiple of the known
    factors that is at least 8. A resumed run keeps it.
    """
    per_device_train_batch_size: int | str = "auto"
    """Rows per micro-batch on one rank; ``auto`` derives it."""
    gradient_accumulation_steps: int | str = "auto"
    """Micro-batches per optimizer step; ``auto`` derives it."""
    batch_schedule: list[list[int]] | None = None
    """Rows per optimizer step that grow during the run: pairs of a beginning and a size.

    The first begins at 0. The micro-batch stays, and the accumulation grows.
    """
    batch_schedule_unit: BatchScheduleUnit = BatchScheduleUnit.steps
    """Unit of the beginnings of sizes: optimizer ``steps`` done, or ``tokens`` seen.

    Padding is excluded.
    """
    batch_schedule_lr: BatchScheduleLr = BatchScheduleLr.none
    """Change of the peak learning rate with the size: ``none``, ``linear`` or ``sqrt``.

    It is multiplied by the size over the first size (``linear``), by the root of that (``sqrt``),
    or not at all (``none``).
    """
    per_device_eval_batch_size: int | str = "auto"
    """Rows per forward pass of an evaluation on one rank; ``auto`` takes the micro-batch size."""
    num_train_epochs: float = 1.0
    """Passes over the training rows, where ``max_steps`` is not set."""
    max_steps: int | None = None
    """Length of the run in optimizer steps, instead of epochs."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global 2-norm; 0 for no clipping."""
    neftune_noise_alpha: float | None = None
    """Scale of uniform noise on the input embeddings in training (NEFTune); null for none.

    An element gets at most ``neftune_noise_alpha`` over the root of a row's embedding elements.
    """
    label_smoothing: float = 0.0
    """Share of a target that is spread over all tokens or classes in the loss of training.

    Evaluations have the loss without it.
    """
    gradient_checkpointing: bool | int | str = "auto"
    """Recompute activations in the backward pass: of all layers, of none, or of so many.

    ``auto`` takes as few layers as the device's memory allows, or a smaller micro-batch where that
    is faster (docs/planner.md).
    """
    compile: Compile = Compile.none
    """Parts of the model that ``torch.compile`` compiles: ``layers``, each by itself, or ``none``.

    Layers cannot be compiled under ZeRO 3, nor with weights in 4 bits (docs/speed.md).
    """
    logging_steps: int = 1
    """Optimizer steps between lines of ``metrics.jsonl``.

    A line has the mean loss of all tokens trained since the previous line.
    """
    eval_strategy: bool | str = "steps"
    """Evaluate every ``eval_steps``, at the end of every epoch, or never.

    The values are ``steps``, ``epoch`` and ``no``, which YAML reads as false. Unless it is ``no``,
    the run also evaluates at step 0 and at the end.
    """
    eval_steps: int | None = None
    """Optimizer steps between evaluations; null for none between the first and the last."""
    eval_max_rows: int | str | None = "auto"
    """Rows used by one evaluation during training; null for all.

    ``auto`` is 256 for language modeling, and all for other tasks, whose metrics need them.
    """
    save_strategy: bool | str = "steps"
    """Save every ``save_steps``, at the end of every epoch, or not before the end.

    The values are ``steps``, ``epoch`` and ``no``. The run always saves one at the end.
    """
    save_steps: int | None = 100
    """Optimizer steps between checkpoints with ``save_strategy=steps``; null for none."""
    save_total_limit: int | None = 2
    """Checkpoints kept, newest first, and the best one beside them; null keeps all."""
    load_best_model_at_end: bool | str = "auto"
    """Publish and export the weights of the best checkpoint instead of the last one's.

    ``auto`` does so for all tasks but language modeling, where there are evaluations to choose by.
    """
    early_stopping_patience: int | None = None
    """Evaluations in a row without an improvement before the run ends; null for no early end."""
    early_stopping_threshold: float = 0.0
    """An improvement counts for early stopping if it is larger than this."""
    on_nan: OnNan = OnNan.stop
    """Reaction to a loss or gradient that is not finite: ``stop``, ``skip`` or ``rollback``.

    ``stop`` names the rows and ends the run; ``skip`` leaves the step out; ``rollback`` returns to
    the newest checkpoint and then leaves the step out.
    """
    sample_answers: bool | str = "auto"
    """Generate answers to three evaluation prompts before and after training.

    ``auto`` skips this for large models that are sharded or offloaded.
    """


def strategy_name(value: bool | str) -> str:
    """Return the name of a strategy; YAML reads a bare ``no`` as false."""
    return NO if value is False else str(value)
