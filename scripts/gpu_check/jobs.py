"""What is trained: small models, few steps, and for each job the run on the CPU that it is compared
with.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from scripts.gpu_check.compare import Curve

#: Of every run.
COMMON = ("train.sample_answers=false", "export=none", "train.save_total_limit=1")
#: 107,000 parameters, 3 steps of 8 rows; the loss falls from 6.26 to 5.73 where all of them are
#: trained.
TINY = (
    *("model=tiny", "data.train=stdlib_docs@96", "data.val_set_size=8", "data.max_seq_length=256"),
    *("train.global_batch_size=8", "train.max_steps=3", "optim.learning_rate=1e-2"),
)
#: 16 steps of 8 micro-batches, long enough to be killed between two checkpoints.
LONG = (
    "model=tiny",
    "tuner=full",
    "data.train=stdlib_docs@320",
    "data.val_set_size=8",
    "data.max_seq_length=256",
    "train.global_batch_size=16",
    "train.per_device_train_batch_size=2",
    "train.max_steps=16",
    "train.save_steps=4",
    "optim.learning_rate=3e-3",
)
#: 50 M parameters: 0.8 GB of weights, gradients and optimizer states, of which the optimizer has
#: 0.6 GB.
WIDE = (
    "model=tiny",
    "model.config.hidden_size=768",
    "model.config.intermediate_size=3072",
    "tuner=full",
    "model.config.num_hidden_layers=4",
    "model.config.num_attention_heads=12",
    "model.config.num_key_value_heads=12",
    "model.config.head_dim=64",
    "model.config.vocab_size=8192",
    "model.config.tie_word_embeddings=false",
    "data.train=stdlib_docs@96",
    "data.val_set_size=8",
    "data.max_seq_length=256",
    "data.overlong=truncate",
    # Copies of states that are written in the background would be part of the peak, and are not
    # made where memory is limited.
    "train.global_batch_size=2",
    "train.max_steps=3",
    "train.save_steps=3",
    "checkpoint.background=false",
)
#: The embedded model, with few tokens, so that a CPU can do it too.
SMOLLM2 = (
    "model=smollm2_135m",
    "tuner=lora",
    "data.train=stdlib_docs@96",
    "data.val_set_size=8",
    "data.packing=true",
    "data.max_seq_length=256",
    "train.global_batch_size=4",
    "train.per_device_train_batch_size=4",
    *("train.max_steps=4", "optim.learning_rate=1e-3"),
)
#: All of it is trained, on rows enough to keep a card busy.
SMOLLM2_FULL = (
    "model=smollm2_135m",
    "tuner=full",
    "data.train=stdlib_docs",
    "data.val_set_size=8",
    "data.packing=true",
    "data.max_seq_length=1024",
    "train.global_batch_size=16",
    "train.max_steps=10",
    "optim.learning_rate=2e-5",
)
PLAIN = ("zero=0", "offload=none")
#: Of each tuner but ``full`` and ``lora``, which the placements and the precisions have.
TUNERS = {
    **{name: (f"tuner={name}",) for name in ("dora", "rslora", "lora_plus", "qlora")},
    # The preset's decomposition begins with random numbers, which a GPU draws otherwise.
    "pissa": ("tuner=pissa", "tuner.init_lora_weights=pissa"),
    "freeze": ("tuner=freeze", "tuner.freeze.last_layers=1"),
}
#: Overrides and precision of each optimizer but AdamW in fp32. The rate suits what moves each
#: element by the whole of it.
OPTIMIZERS = {
    "adamw_bf16": (("optim=adamw_bf16",), "bf16"),
    "adamw_8bit": (("optim=adamw_8bit",), "bf16"),
    "adamw_paged_8bit": (("optim=adamw_paged_8bit",), "bf16"),
    "muon": (("optim=muon",), "bf16"),
    "lion": (("optim=lion", "optim.learning_rate=2e-3"), "fp32"),
    "adafactor": (("optim=adafactor",), "fp32"),
}
LARGE_LENGTH = 2048
#: Eight layers as wide as those of Llama-3-8B, with random weights: 2.8 billion parameters.
LARGE = (
    "model=tiny",
    "model.config.hidden_size=4096",
    "model.config.intermediate_size=14336",
    "model.config.num_hidden_layers=8",
    "model.config.num_attention_heads=32",
    "model.config.num_key_value_heads=8",
    "model.config.head_dim=128",
    "model.config.vocab_size=128256",
    "model.config.tie_word_embeddings=false",
    "model.config.max_position_embeddings=8192",
    "data.train=stdlib_docs",
    "data.val_set_size=0",
    "data.packing=true",
    f"data.max_seq_length={LARGE_LENGTH}",
    "train.global_batch_size=4",
    "train.per_device_train_batch_size=2",
    "train.max_steps=6",
    "train.save_strategy=no",
    "optim.learning_rate=1e-5",
)
#: What of it is trained, and with which states.
LARGE_WAYS = {
    "qlora": ("tuner=qlora",),
    "full-adamw_bf16": ("tuner=full", "optim=adamw_bf16"),
    "full-adamw_8bit": ("tuner=full", "optim=adamw_8bit"),
}
#: What the card must have for each of them.
LARGE_BYTES = 70 * 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training run."""

    name: str
    overrides: tuple[str, ...]
    placement: tuple[str, ...] = PLAIN
    """Where its states lie, and what of the batch must not change its losses."""
    precision: str = "fp32"
    ranks: int = 1
    plain: tuple[str, ...] = PLAIN
    """The placement of the run on the CPU: the simplest that this job has."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """Of the command, without accelerator and folders."""
        return (
            *self.overrides,
            *COMMON,
            *self.placement,
            f"precision={self.precision}",
            f"launch.nproc={self.ranks}",
        )

    @property
    def reference(self) -> Job:
        """The same arithmetic on one rank without ZeRO; in fp32 for fp16, which few CPUs have."""
        precision = "fp32" if self.precision == "fp16" else self.precision
        return Job(
            name=self.name, overrides=self.overrides, placement=self.plain, precision=precision
        )


@dataclass(frozen=True, slots=True)
class Trained:
    """A run that has ended well."""

    folder: Path
    console: str = field(repr=False)

    @property
    def curve(self) -> Curve:
        """From its ``metrics.jsonl``."""
        lines = list(map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines()))
        # A number that is not finite is null there.
        held_out = [_number(line["eval_loss"]) for line in lines if "eval_loss" in line]
        losses = [_number(line["loss"]) for line in lines if "loss" in line]
        return Curve(losses, held_out[0], held_out[-1])


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def placement_job(stage: int, rung: str) -> Job:
    """All parameters of the tiny model, with states where this rung has them."""
    placement = (f"zero={stage}", f"offload={rung}", "train.per_device_train_batch_size=4")
    return Job(
        name=f"placement/zero{stage}-{rung}", overrides=(*TINY, "tuner=full"), placement=placement
    )


def precision_job(precision: str, tuner: str, rows: str, stage: int, rung: str) -> Job:
    """One of the ways to train the tiny model."""
    placement = (f"zero={stage}", f"offload={rung}", "train.per_device_train_batch_size=4")
    overrides = (*TINY, f"tuner={tuner}", f"data.packing={str(rows == 'packed').lower()}")
    return Job(
        name=f"precision/{precision}-{tuner}-{rows}",
        overrides=overrides,
        placement=placement,
        precision=precision,
    )


def tuner_job(tuner: str, stage: int, rung: str) -> Job:
    """One of the tuners, in fp32, so that a fault is larger than rounding."""
    placement = (f"zero={stage}", f"offload={rung}", "train.per_device_train_batch_size=4")
    return Job(
        name=f"tuner/{tuner}-zero{stage}-{rung}",
        overrides=(*TINY, *TUNERS[tuner]),
        placement=placement,
    )


def optimizer_job(optimizer: str, stage: int, rung: str) -> Job:
    """One of the optimizers, with all parameters trained."""
    overrides, precision = OPTIMIZERS[optimizer]
    placement = (f"zero={stage}", f"offload={rung}", "train.per_device_train_batch_size=4")
    return Job(
        name=f"optimizer/{optimizer}-zero{stage}-{rung}",
        overrides=(*TINY, "tuner=full", *overrides),
        placement=placement,
        precision=precision,
        # DeepSpeed has bf16 master weights, and Muon, from stage 1 on.
        plain=("zero=1", "offload=none") if stage else PLAIN,
    )


def large_job(name: str) -> Job:
    """What should fill tens of gigabytes as planned."""
    return Job(
        name=f"large/{name}",
        overrides=(*LARGE, *LARGE_WAYS[name]),
        placement=("zero=3", "offload=none"),
        precision="bf16",
    )


def ranks_job(ranks: int) -> Job:
    """As many ranks as there are cards, which take their rows and weights from one another."""
    rows = 8 if 8 % ranks == 0 else ranks
    overrides = (*TINY, f"train.global_batch_size={rows}") if rows != 8 else TINY
    micro = min(4, rows // ranks)
    placement = ("zero=3", "offload=none", f"train.per_device_train_batch_size={micro}")
    return Job(
        name="ranks/zero3", overrides=(*overrides, "tuner=full"), placement=placement, ranks=ranks
    )


ADAPTER = precision_job("bf16", "lora", "padded", 1, "none")
QUANTIZED = tuner_job("qlora", 3, "none")
PROFILED = Job(
    name="watch/profile", overrides=(*TINY, "tuner=lora", "train.max_steps=8"), precision="bf16"
)
UNDISTURBED = Job(name="resume/undisturbed", overrides=LONG, placement=("zero=2", "offload=none"))
UNLIMITED = Job(name="fallback/out-of-memory", overrides=WIDE, placement=PLAIN, precision="bf16")
SMALL_SMOLLM2 = Job(
    name="smollm2/losses",
    overrides=SMOLLM2,
    placement=("zero=auto", "offload=auto"),
    precision="bf16",
)
LARGE_SMOLLM2 = Job(
    name="smollm2/plan",
    overrides=SMOLLM2_FULL,
    placement=("zero=auto", "offload=auto"),
    precision="bf16",
)
