"""Rules over single keys: ranges of numbers, lists of words, paths that are not empty."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from llmtune.config.groups.profile import MOST_STEPS
from llmtune.config.schema import Config
from llmtune.config.stored import read_key, to_plain

#: Paths for which an empty text would mean the current folder, or the root of the machine.
PATHS = (
    "resume_from_checkpoint",
    "checkpoint.mirror",
    "target.checkpoint",
    "tuner.adapter_path",
    "offload.nvme_path",
    "paths.cache_dir",
    "predict.output",
)

#: Numbers above 0.
POSITIVE = (
    "train.num_train_epochs",
    "train.max_steps",
    "train.logging_steps",
    "train.eval_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.early_stopping_patience",
    "train.neftune_noise_alpha",
    "data.max_seq_length",
    "data.shuffle_buffer",
    "tuner.lora_r",
    "tuner.lora_alpha",
    "tuner.lora_plus_ratio",
    "tuner.freeze.last_layers",
    "checkpoint.keep_every",
    "launch.nproc",
    "launch.sequence_parallel_size",
    "launch.hang_timeout",
    "launch.stop_timeout",
    "hardware.nodes",
    "hardware.gpus_per_node",
    "hardware.gpu_flops",
    "hardware.compute_efficiency",
    "hardware.gpu_hour_price",
    "optim.eps",
    "schedule.min_lr",
    "schedule.num_cycles",
    "schedule.power",
    "schedule.timescale",
    "schedule.num_decay_steps",
    "export.max_shard_bytes",
    "chat.max_new_tokens",
    "predict.max_new_tokens",
    "predict.top_k",
    "hparams_search.trials",
    "hparams_search.timeout",
)

#: Numbers of at least 0.
NOT_NEGATIVE = (
    "optim.weight_decay",
    "optim.momentum",
    "train.max_grad_norm",
    "train.label_smoothing",
    "train.early_stopping_threshold",
    "tuner.lora_dropout",
    "schedule.warmup_ratio",
    "schedule.warmup_steps",
    "schedule.min_lr_rate",
    "schedule.lr_end",
    "schedule.decay_ratio",
    "data.val_set_size",
    "data.dataloader_num_workers",
    "launch.max_restarts",
    "profile.steps",
    "profile.warmup_steps",
    "chat.temperature",
    "predict.temperature",
    "predict.seed",
    "hparams_search.pruner_startup_trials",
    "hparams_search.pruner_warmup_steps",
    "hparams_search.seed",
    "runs.unused_days",
    "seed",
)

#: Numbers that are not negative and below 1, and what they are.
BELOW_ONE = {
    "schedule.warmup_ratio": "a share of all steps",
    "schedule.min_lr_rate": "a share of the peak",
    "train.label_smoothing": "a share",
    "tuner.lora_dropout": "a probability",
    "optim.momentum": "a share",
}

#: Counts of rows or steps that may also be ``auto``.
COUNTS_OR_AUTO = (
    "train.global_batch_size",
    "train.per_device_train_batch_size",
    "train.gradient_accumulation_steps",
    "train.per_device_eval_batch_size",
    "predict.batch_size",
)

#: Switches that may also be ``auto``.
FLAGS_OR_AUTO = (
    "train.sample_answers",
    "train.load_best_model_at_end",
    "checkpoint.greater_is_better",
    "checkpoint.background",
)


def find_value_problems(config: Config) -> list[str]:
    """Return every key whose value is impossible by itself, in words a user can act on."""
    return [
        *_find_infinite_numbers(config),
        *_find_name_problems(config),
        *_find_empty_paths(config),
        *_find_range_problems(config),
        *_find_choice_problems(config),
    ]


def _find_infinite_numbers(config: Config) -> Iterator[str]:
    """Find ``nan``, which passes every comparison, and ``inf``, which passes every lower bound."""
    for key, value in _infinite_numbers(to_plain(config), ""):
        yield f"{key}={value}: must be a finite number"


def _infinite_numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers that are not finite, each with its dotted key."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _infinite_numbers(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _infinite_numbers(item, key)


def _find_name_problems(config: Config) -> Iterator[str]:
    """Find a run's name that is not one folder below ``runs/``, and one at a mirror."""
    name = config.run_name
    if name and (set(name) & set("/\\\0") or name.strip() in ("", ".", "..")):
        yield f"run_name={name}: a name, without slashes; another folder is named by output_dir="


def _find_empty_paths(config: Config) -> Iterator[str]:
    """Find empty paths: ``checkpoint.mirror=$PLACE`` of a script where the variable is not set."""
    for key in PATHS:
        value = read_key(config, key)
        if value is not None and not value.strip():
            yield f"{key}= is empty: name a place, or leave the key out"


def _find_range_problems(config: Config) -> Iterator[str]:
    for key in POSITIVE:
        value = read_key(config, key)
        if value is not None and not value > 0:
            yield f"{key}={value}: must be above 0"
    for key in NOT_NEGATIVE:
        value = read_key(config, key)
        if value is not None and value < 0:
            yield f"{key}={value}: must not be negative"
    for key, meaning in BELOW_ONE.items():
        value = read_key(config, key)
        if value is not None and value >= 1:
            yield f"{key}={value}: {meaning}, below 1"
    if (decay := config.schedule.decay_ratio) > 1:
        yield f"schedule.decay_ratio={decay}: a share of all steps, at most 1"
    if config.profile.steps > MOST_STEPS:
        yield f"profile.steps={config.profile.steps}: at most {MOST_STEPS}; a trace is large"
    if not 0 < config.predict.top_p <= 1:
        yield f"predict.top_p={config.predict.top_p}: a share above 0, of at most 1"
    betas = config.optim.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield f"optim.betas={betas}: two numbers of at least 0 and below 1"


def _find_choice_problems(config: Config) -> Iterator[str]:
    """OmegaConf's unions cannot restrict a text to a list of words."""
    rows = config.train.eval_max_rows
    if rows not in ("auto", None) and not (type(rows) is int and rows > 0):
        yield f"train.eval_max_rows={rows}: must be above 0 and a whole number, 'auto' or null"
    weights = config.data.class_weights
    if weights not in ("none", "balanced", None) and not isinstance(weights, list):
        yield f"data.class_weights={weights}: none, balanced, or a list of numbers above 0"
    for key in COUNTS_OR_AUTO:
        value = read_key(config, key)
        if value != "auto" and not (type(value) is int and value > 0):
            yield f"{key}={value}: must be above 0 and a whole number, or 'auto'"
    rate = config.optim.learning_rate
    if rate != "auto" and (isinstance(rate, str) or rate <= 0):
        yield f"optim.learning_rate={rate}: 'auto', or a number above 0"
    layers = config.train.gradient_checkpointing
    is_count = type(layers) is int and layers > 0
    if layers != "auto" and not isinstance(layers, bool) and not is_count:
        yield (
            f"train.gradient_checkpointing={layers}: 'auto', true, false, or the number of layers"
        )
    for key in FLAGS_OR_AUTO:
        flag = read_key(config, key)
        if flag not in ("auto", True, False):
            yield f"{key}={flag}: 'auto', true or false"
    if config.zero.stage not in ("auto", 0, 1, 2, 3):
        yield f"zero.stage={config.zero.stage}: 0, 1, 2, 3 or 'auto'"
