"""Rules over the whole config: one function a topic, each returning its problems, so that all are
reported together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from llmtune.config.groups.export import MergeOnto
from llmtune.config.schema import Config, OffloadDevice, Precision, TunerKind
from llmtune.config.stored import read_key, to_plain


def problems(config: Config) -> list[str]:
    """Every broken rule, in words a user can act on."""
    return [
        *_check_finite(config),
        *_check_name(config),
        *_check_places(config),
        *_check_ranges(config),
        *_check_choices(config),
        *_check_zero(config),
        *_check_tuner(config),
        *_check_schedule(config),
        *_check_data(config),
        *_check_checkpoint(config),
        *_check_export(config),
    ]


def _check_finite(config: Config) -> list[str]:
    """``nan`` passes every comparison, and ``inf`` every lower bound."""
    return [
        f"{key}={value}: must be a finite number" for key, value in _numbers(to_plain(config), "")
    ]


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Numbers that are not finite, each with its dotted key."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, key)


def _check_name(config: Config) -> list[str]:
    """A name is one folder below ``runs/``, and one place at a mirror."""
    name = config.run_name
    if name and (set(name) & set("/\\\0") or name.strip() in ("", ".", "..")):
        return [f"run_name={name}: a name, without slashes; another folder is named by output_dir="]
    return []


#: Places that an empty text would make the current folder, or the root of the machine.
PLACES = (
    "resume_from_checkpoint",
    "checkpoint.mirror",
    "target.checkpoint",
    "tuner.adapter_path",
    "offload.nvme_path",
    "paths.cache_dir",
)


def _check_places(config: Config) -> list[str]:
    """As of ``checkpoint.mirror=$PLACE`` where a script has not set the variable."""
    found = [
        key for key in PLACES if (value := read_key(config, key)) is not None and not value.strip()
    ]
    return [f"{key}= is empty: name a place, or leave the key out" for key in found]


def _check_ranges(config: Config) -> list[str]:
    positive = {
        "train.num_train_epochs": config.train.num_train_epochs,
        "train.max_steps": config.train.max_steps,
        "train.logging_steps": config.train.logging_steps,
        "train.eval_steps": config.train.eval_steps,
        "train.eval_max_rows": config.train.eval_max_rows,
        "train.save_steps": config.train.save_steps,
        "train.save_total_limit": config.train.save_total_limit,
        "data.max_seq_length": config.data.max_seq_length,
        "data.shuffle_buffer": config.data.shuffle_buffer,
        "tuner.lora_r": config.tuner.lora_r,
        "tuner.lora_alpha": config.tuner.lora_alpha,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "launch.nproc": config.launch.nproc,
        "launch.hang_timeout": config.launch.hang_timeout,
        "launch.stop_timeout": config.launch.stop_timeout,
        "hardware.nodes": config.hardware.nodes,
        "hardware.gpus_per_node": config.hardware.gpus_per_node,
        "hardware.gpu_flops": config.hardware.gpu_flops,
        "hardware.compute_efficiency": config.hardware.compute_efficiency,
        "optim.eps": config.optim.eps,
        "export.max_shard_bytes": config.export.max_shard_bytes,
        "chat.max_new_tokens": config.chat.max_new_tokens,
    }
    not_negative = {
        "optim.weight_decay": config.optim.weight_decay,
        "train.max_grad_norm": config.train.max_grad_norm,
        "tuner.lora_dropout": config.tuner.lora_dropout,
        "schedule.warmup_ratio": config.schedule.warmup_ratio,
        "schedule.warmup_steps": config.schedule.warmup_steps,
        "data.val_set_size": config.data.val_set_size,
        "data.dataloader_num_workers": config.data.dataloader_num_workers,
        "launch.max_restarts": config.launch.max_restarts,
        "chat.temperature": config.chat.temperature,
        "seed": config.seed,
    }
    found = [
        f"{key}={value}: must be above 0"
        for key, value in positive.items()
        if value is not None and not value > 0
    ]
    found += [
        f"{key}={value}: must not be negative"
        for key, value in not_negative.items()
        if value is not None and value < 0
    ]
    if config.schedule.warmup_ratio >= 1:
        found.append(
            f"schedule.warmup_ratio={config.schedule.warmup_ratio}: a share of all steps, below 1"
        )
    if config.tuner.lora_dropout >= 1:
        found.append(f"tuner.lora_dropout={config.tuner.lora_dropout}: a probability, below 1")
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        found.append(f"optim.betas={config.optim.betas}: two numbers of at least 0 and below 1")
    return found


def _check_choices(config: Config) -> list[str]:
    """Keys that take a word or a value, which OmegaConf's unions cannot hold to a list."""
    found = []
    for key, value in {
        "train.global_batch_size": config.train.global_batch_size,
        "train.per_device_train_batch_size": config.train.per_device_train_batch_size,
        "train.gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        "train.per_device_eval_batch_size": config.train.per_device_eval_batch_size,
    }.items():
        if value != "auto" and not (type(value) is int and value > 0):
            found.append(f"{key}={value}: must be above 0 and a whole number, or 'auto'")
    rate = config.optim.learning_rate
    if rate != "auto" and (isinstance(rate, str) or rate <= 0):
        found.append(f"optim.learning_rate={rate}: 'auto', or a number above 0")
    for key, flag in {
        "train.gradient_checkpointing": config.train.gradient_checkpointing,
        "train.sample_answers": config.train.sample_answers,
        "checkpoint.background": config.checkpoint.background,
    }.items():
        if flag not in ("auto", True, False):
            found.append(f"{key}={flag}: 'auto', true or false")
    if config.zero.stage not in ("auto", 0, 1, 2, 3):
        found.append(f"zero.stage={config.zero.stage}: 0, 1, 2, 3 or 'auto'")
    return found


#: (optimizer, param) that are rungs of the ladder.
_OFFLOADS = {
    *(("auto", "auto"), ("none", "none"), ("cpu", "none"), ("cpu", "cpu")),
    *(("nvme", "none"), ("nvme", "nvme"), ("cpu", "nvme")),
}


def _check_zero(config: Config) -> list[str]:
    stage, offload = config.zero.stage, config.offload
    pair = (offload.optimizer.value, offload.param.value)
    found = []
    if offload.param in (OffloadDevice.cpu, OffloadDevice.nvme) and stage in (0, 1, 2):
        found.append(
            f"offload.param={offload.param.value} needs zero=3 (zero.stage is {stage}): DeepSpeed"
            " ignores it below stage 3; add zero=3, or offload=optimizer_cpu"
        )
    if offload.optimizer is OffloadDevice.nvme and stage in (0, 1, 2):
        found.append(
            f"offload.optimizer=nvme needs zero=3 (zero.stage is {stage}): add zero=3, or"
            " offload=optimizer_cpu"
        )
    if offload.optimizer is OffloadDevice.cpu and stage == 0:
        found.append(
            "offload.optimizer needs zero=1 or higher (zero.stage is 0): add zero=1, or"
            " offload=none"
        )
    if pair not in _OFFLOADS:
        found.append(
            f"offload.optimizer={pair[0]} with offload.param={pair[1]} is no placement of the"
            " ladder: take offload=none, optimizer_cpu, cpu, optimizer_nvme, nvme or auto"
        )
    if "nvme" in pair and offload.nvme_path is None and config.hardware.nvme_bytes is None:
        found.append(
            "offload on NVMe needs a folder on a fast local disk: add offload.nvme_path=/path (or"
            " hardware.nvme_bytes= to plan for another machine)"
        )
    if pair == ("nvme", "none") and config.tuner.kind is not TunerKind.full:
        found.append(
            f"offload=optimizer_nvme with tuner={config.tuner.kind.value} is pointless: the"
            " optimizer of adapters is small. Take offload=optimizer_cpu, or offload=nvme for the"
            " weights"
        )
    if pair not in (("none", "none"), ("auto", "auto")) and config.precision is Precision.fp16:
        found.append("offload with precision=fp16 is not supported: use precision=bf16")
    return found


def _check_tuner(config: Config) -> list[str]:
    tuner = config.tuner
    found = []
    if tuner.kind is TunerKind.full and tuner.adapter_path:
        found.append(
            f"tuner.adapter_path={tuner.adapter_path} needs tuner=lora; full fine-tuning has no"
            " adapter"
        )
    for key, pattern, kinds in (
        ("rank_pattern", tuner.rank_pattern, int),
        ("alpha_pattern", tuner.alpha_pattern, (int, float)),
    ):
        # A truth value is an integer to Python, and what is no number is not at most 0.
        right = {
            n
            for n, v in pattern.items()
            if isinstance(v, kinds) and not isinstance(v, bool) and 0 < v < math.inf
        }
        if wrong := {name: value for name, value in pattern.items() if name not in right}:
            found.append(f"tuner.{key}={wrong}: numbers above 0 by module, such as {{q_proj: 8}}")
    modules = tuner.target_modules
    if modules != "all-linear" and not (
        isinstance(modules, list) and modules and all(isinstance(name, str) for name in modules)
    ):
        found.append(
            f"tuner.target_modules={modules}: 'all-linear', or a list such as [q_proj,v_proj]"
        )
    return found


def _check_schedule(config: Config) -> list[str]:
    steps, total = config.schedule.warmup_steps, config.train.max_steps
    if steps is not None and total is not None and steps >= total:
        return [f"schedule.warmup_steps={steps} leaves nothing of train.max_steps={total}"]
    return []


def _check_data(config: Config) -> list[str]:
    data = config.data
    found = []
    for key, value in {"data.train": data.train, "data.eval": data.eval}.items():
        sources = value if isinstance(value, list) and value else [value]
        if not all(
            (isinstance(source, str | dict) and source) or (key == "data.eval" and value is None)
            for source in sources
        ):
            found.append(f"{key}={value}: a file name, a mapping with path, or a list of them")
    size = data.val_set_size
    if isinstance(size, float) and size >= 1:
        found.append(f"data.val_set_size={size}: a share below 1, or a whole number of rows")
    if data.format != "auto" and data.train == "stdlib_docs":
        found.append("data.format is for files; stdlib_docs has its own")
    if not 0 <= data.max_overlong_share <= 1:
        found.append(f"data.max_overlong_share={data.max_overlong_share}: a share between 0 and 1")
    if data.num_workers != "auto" and not (
        isinstance(data.num_workers, int) and data.num_workers >= 0
    ):
        found.append(f"data.num_workers={data.num_workers}: 'auto', or an integer of at least 0")
    if data.pin_memory not in ("auto", True, False):
        found.append(f"data.pin_memory={data.pin_memory}: 'auto', true or false")
    if data.packing and data.format == "classification":
        found.append(
            "data.packing=true: classification rows cannot share a row; take data.packing=false"
        )
    return found + (_check_streaming(config) if data.streaming else [])


#: What evaluation lines of ``metrics.jsonl`` have.
_METRICS = ("eval_loss", "eval_perplexity")


def _check_checkpoint(config: Config) -> list[str]:
    metric, every, saves = (
        config.checkpoint.metric_for_best_model,
        config.train.eval_steps,
        config.train.save_steps,
    )
    if metric is None:
        return []
    if metric not in _METRICS:
        return [
            f"checkpoint.metric_for_best_model={metric}: evaluations have {' and '.join(_METRICS)}"
        ]
    if every is None or (saves is not None and saves % every):
        return [
            f"checkpoint.metric_for_best_model={metric} needs an evaluation at every checkpoint:"
            f" train.save_steps={saves} is no multiple of train.eval_steps={every}"
        ]
    return []


def _check_streaming(config: Config) -> list[str]:
    data = config.data
    found = []
    if config.train.max_steps is None:
        found.append("data.streaming=true needs train.max_steps: a stream does not know its length")
    if data.eval is None and data.val_set_size:
        found.append(
            "data.streaming=true splits nothing off: add data.eval=FILE, or data.val_set_size=0"
        )
    return found


def _check_export(config: Config) -> list[str]:
    """What could not be written would be told only after the training."""
    export, full = config.export, config.tuner.kind is TunerKind.full
    found = []
    if full and export.format == "adapter":
        found.append("export=adapter: full fine-tuning has no adapter; take export=safetensors")
    if full and export.merge_onto is MergeOnto.nf4:
        found.append(
            "export.merge_onto=nf4: full fine-tuning has no adapter to merge; the key is for QLoRA"
        )
    return found
